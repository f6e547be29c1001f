// Two Gaussians on the plane: drag them, slide alpha, and see where the two divergences meet.
qstarExplorers.gaussians = (root, data, saved, keeper) => {
  const { _, button, canvas, choice, clamp, handle, html, line, number, set, shapes, short, slider, svg, teller } = qstarTools;
  const presets = Object.values(data.presets).flat();
  const PARENTS = ["policy", "teacher"];
  let preset = data.start;
  let centre, half; // of what is shown of the plane: a square, half so wide
  let parents;
  let alpha = null; // null: at alpha*

  // A parent is a Gaussian, and what its handles show of it: an angle and two standard deviations.
  const parent = (mean, covariance) => {
    const { values, angle } = qstarCore.eigen(covariance);
    return { mean: [...mean], covariance, angle, widths: values.map(Math.sqrt) };
  };
  const reshape = (law) => {
    const [cos, sin] = [Math.cos(law.angle), Math.sin(law.angle)];
    const [a, b] = law.widths.map((width) => width * width);
    law.covariance = [a * cos * cos + b * sin * sin, (a - b) * cos * sin, a * sin * sin + b * cos * cos];
  };
  const load = (at) => {
    preset = at;
    parents = [presets[at].policy, presets[at].teacher].map(({ mean, covariance }) => parent(mean, covariance));
    fit();
  };
  // As much of the plane as both ellipses take.
  function fit() {
    const ends = [0, 1].map((axis) =>
      parents.flatMap(({ mean, covariance }) =>
        [-2.2, 2.2].map((reach) => mean[axis] + reach * Math.sqrt(covariance[2 * axis]))));
    centre = ends.map((at) => (Math.min(...at) + Math.max(...at)) / 2);
    half = Math.max(3, ...ends.map((at) => (Math.max(...at) - Math.min(...at)) / 2));
  }
  function restore(text) {
    const [first, at, ...numbers] = (text ?? "").split("_");
    const values = numbers.map(Number);
    const kept = /^p\d+$/.test(first) ? Number(first.slice(1)) : -1;
    if (kept >= 0 && kept < presets.length) load(kept);
    else if (first === "x" && values.length === 10 && values.every(Number.isFinite)) {
      const [m, s] = [values.slice(0, 5), values.slice(5)];
      const laws = [m, s].map(([x, y, xx, xy, yy]) => ({ mean: [x, y], covariance: [xx, xy, yy] }));
      if (laws.some(({ covariance: [xx, xy, yy] }) => !(xx > 0 && xx * yy - xy * xy > 0))) return load(data.start);
      parents = laws.map(({ mean, covariance }) => parent(mean, covariance));
      preset = -1;
      fit();
    } else return load(data.start);
    alpha = at === "s" || !(Number(at) >= 0 && Number(at) <= 1) ? null : Number(at);
  }
  function save() {
    const at = alpha === null ? "s" : short(alpha);
    if (preset === data.start && alpha === null) return keeper.write("");
    if (preset >= 0) return keeper.write(`p${preset}_${at}`);
    keeper.write(["x", at, ...parents.flatMap((law) => [...law.mean, ...law.covariance].map(short))].join("_"));
  }

  // --- What is on the page
  const drawing = canvas(_("Two Gaussians on the plane, and their geometric mean"), draw);
  const curves = canvas(_("The two divergences from the geometric mean, against alpha"), draw, "img");
  const view = {};
  const moved = () => {
    preset = -1;
    draw();
  };
  const NAMES = { policy: _("policy"), teacher: _("teacher") };
  const AXES = [_("first axis of the {}"), _("second axis of the {}")];
  const marks = PARENTS.flatMap((name, who) => {
    const shape = { policy: shapes.disc, teacher: shapes.square }[name];
    const law = () => parents[who];
    const put = (mean) => {
      law().mean = mean.map((at, axis) => clamp(at, centre[axis] - 0.97 * half, centre[axis] + 0.97 * half));
    };
    const mean = handle(drawing, { path: shape, class: name }, _("mean of the {}", NAMES[name]), {
      move: (x, y) => {
        put([(x - view.width / 2) / view.scale, (view.width / 2 - y) / view.scale].map((at, axis) => at + centre[axis]));
        moved();
      },
      nudge: (right, up, far) => {
        put(law().mean.map((at, axis) => short(at + (axis ? up : right) * (far ? 1 : 0.1))));
        moved();
      },
      done: settle,
    });
    const ends = [0, 1].map((axis) =>
      handle(drawing, { path: shapes.diamond, class: `${name} qs-end` }, _(AXES[axis], NAMES[name]), {
        move: (x, y) => {
          const [right, up] = [(x - view.x(law().mean[0])) / view.scale, (view.y(law().mean[1]) - y) / view.scale];
          law().angle = Math.atan2(up, right) - (axis ? Math.PI / 2 : 0);
          law().widths[axis] = clamp(Math.hypot(right, up) / 2, 0.1, 6);
          reshape(law());
          moved();
        },
        nudge: (right, up, far) => {
          law().angle -= (right * Math.PI * (far ? 15 : 3)) / 180;
          law().widths[axis] = clamp(law().widths[axis] * (far ? 1.3 : 1.05) ** up, 0.1, 6);
          reshape(law());
          moved();
        },
        done: settle,
      }),
    );
    return [{ who, mean, ends }];
  });
  // After a move: no jumping while all that was seen still fits.
  function settle() {
    const [before, size] = [centre, half];
    fit();
    const apart = Math.hypot(centre[0] - before[0], centre[1] - before[1]);
    if (half + apart < size && half > 0.6 * size) [centre, half] = [before, size];
    draw();
  }
  const shown = svg("g");
  drawing.append(shown, ...marks.flatMap(({ mean, ends }) => [...ends, mean]).reverse());

  const picker = choice(_("Pair"), { "": [["-1", _("your own")]], ...indexed() }, (value) => {
    if (Number(value) < 0) return;
    alpha = null;
    load(Number(value));
    draw();
  });
  function indexed() {
    let at = 0;
    const groups = {};
    for (const [group, cases] of Object.entries(data.presets)) groups[group] = cases.map(({ name }) => [String(at++), name]);
    return groups;
  }
  const exponent = slider(_("α: 0 teacher, 1 policy"), {
    min: 0, max: 1, step: 0.001, say: (value) => number(Number(value)),
    set: (value) => {
      alpha = value;
      draw();
    },
  });
  const star = button(_("to α*"), () => {
    alpha = null;
    draw();
  });
  const cells = {};
  const row = (key, ...name) => html("tr", {}, html("th", { scope: "row" }, ...name), (cells[key] = html("td")));
  const i = (text, role) => html("i", { class: role }, text);
  const q = () => i("q", "qstar");
  const policy = () => i(NAMES.policy, "policy");
  const teacher = () => i(NAMES.teacher, "teacher");
  const table = html("table", {}, html("tbody", {},
    row("star", _("α*, where they meet")),
    row("chernoff", _("C, the divergence there")),
    row("toPolicy", "KL(", q(), " ‖ ", policy(), ")"),
    row("toTeacher", "KL(", q(), " ‖ ", teacher(), ")"),
    row("policyTeacher", "KL(", policy(), " ‖ ", teacher(), ")"),
    row("teacherPolicy", "KL(", teacher(), " ‖ ", policy(), ")"),
    row("acceptPolicy", _("kept of "), policy(), _("’s drafts")),
    row("acceptTeacher", _("kept of "), teacher(), _("’s drafts")),
  ));
  const { status, tell } = teller();
  root.append(
    html("div", { class: "qs-bar" }, picker.field, button(_("Reset"), () => {
      alpha = null;
      load(data.start);
      draw();
    }), keeper.link),
    html("div", { class: "qs-columns" },
      html("div", {}, drawing, html("p", { class: "qs-key" }, html("span", { class: "policy" }, `● ${NAMES.policy}`), " ", html("span", { class: "teacher" }, `■ ${NAMES.teacher}`), " ", html("span", { class: "qstar" }, "★ q"), _(", contours at one and two standard deviations; ◆ turns and stretches."))),
      html("div", {}, html("p", { class: "qs-key" }, html("span", { class: "policy" }, `— KL(q ‖ ${NAMES.policy})`), " ", html("span", { class: "teacher" }, `╌ KL(q ‖ ${NAMES.teacher})`), _(" against α, in nats")), curves, html("div", { class: "qs-row" }, exponent.field, star), table)),
    status,
  );

  const ellipse = (law, radius, role) => {
    const { values, angle } = qstarCore.eigen(law.covariance);
    const [rx, ry] = values.map((value) => radius * Math.sqrt(value) * view.scale);
    const [x, y] = [view.x(law.mean[0]), view.y(law.mean[1])];
    return svg("ellipse", {
      rx, ry, class: `qs-curve ${role}`,
      transform: `translate(${x} ${y}) rotate(${(-angle * 180) / Math.PI})`,
    });
  };

  function draw() {
    const width = drawing.clientWidth;
    if (!width || !parents) return;
    const [policyLaw, teacherLaw] = parents;
    const solved = qstarCore.solveGaussians(policyLaw, teacherLaw);
    const at = alpha ?? solved.alpha;
    const mean = qstarCore.geometricMean(policyLaw, teacherLaw, at);
    const balanced = qstarCore.geometricMean(policyLaw, teacherLaw, solved.alpha);
    Object.assign(view, {
      width, scale: width / (2 * half),
      x: (x) => width / 2 + (x - centre[0]) * view.scale, y: (y) => width / 2 - (y - centre[1]) * view.scale,
    });
    set(drawing, { viewBox: `0 0 ${width} ${width}`, height: width });
    const unit = half > 8 ? 4 : half > 4 ? 2 : 1;
    const grid = [0, 1].flatMap((axis) => {
      const lines = [];
      for (let at = Math.ceil((centre[axis] - half) / unit) * unit; at <= centre[axis] + half; at += unit) {
        const name = at ? "qs-grid" : "qs-grid qs-zero";
        lines.push(svg("path", { class: name, d: axis ? `M0 ${view.y(at)}H${width}` : `M${view.x(at)} 0V${width}` }));
        if (!axis && at) lines.push(svg("text", { x: view.x(at), y: width - 4, class: "qs-tick", "text-anchor": "middle" }, number(at, 0)));
      }
      return lines;
    });
    const path = Array.from({ length: 41 }, (_, step) => qstarCore.geometricMean(policyLaw, teacherLaw, step / 40).mean);
    const [x, y] = balanced.mean;
    shown.replaceChildren(
      ...grid,
      svg("path", { class: "qs-path", d: line(path.map(([x, y]) => [view.x(x), view.y(y)])) }),
      ...[2, 1].flatMap((radius) => [ellipse(teacherLaw, radius, "teacher"), ellipse(policyLaw, radius, "policy")]),
      ...(alpha === null ? [] : [ellipse(balanced, 1, "qstar qs-ghost")]),
      ...[2, 1].map((radius) => ellipse(mean, radius, "qstar")),
      svg("path", { class: "qs-star", d: shapes.star, transform: `translate(${view.x(x)} ${view.y(y)})` }),
    );
    for (const { who, mean: centre, ends } of marks) {
      const { mean: [x, y], angle, widths } = parents[who];
      centre.put(view.x(x), view.y(y), x, `x ${number(x, 2)}, y ${number(y, 2)}`);
      ends.forEach((end, axis) => {
        const turned = angle + (axis ? Math.PI / 2 : 0);
        const reach = 2 * widths[axis];
        const degrees = Math.round(((turned * 180) / Math.PI + 540) % 360 - 180);
        end.put(view.x(x + reach * Math.cos(turned)), view.y(y + reach * Math.sin(turned)), widths[axis],
          _("standard deviation {} at {} degrees", number(widths[axis], 2), number(degrees, 0)));
      });
    }
    drawCurves(solved, at);
    const [toPolicy, toTeacher] = qstarCore.klToParents(solved.axes, at);
    const values = {
      star: number(solved.alpha), chernoff: _("{} nats", number(solved.chernoff)),
      toPolicy: number(toPolicy), toTeacher: number(toTeacher),
      policyTeacher: number(solved.klPolicyTeacher), teacherPolicy: number(solved.klTeacherPolicy),
    };
    for (const [key, parent] of [["acceptPolicy", "policy"], ["acceptTeacher", "teacher"]])
      values[key] = number(qstarCore.acceptanceOf(solved.axes, at, parent));
    for (const [key, text] of Object.entries(values)) cells[key].textContent = text;
    exponent.show(short(at));
    star.disabled = alpha === null;
    picker.select.value = String(preset);
    tell(_("alpha star {}, C {}; at alpha {} the divergences are {} to the policy and {} to the teacher",
      values.star, values.chernoff, number(at), values.toPolicy, values.toTeacher));
    save();
  }

  function drawCurves(solved, at) {
    const [width, height, left, bottom] = [curves.clientWidth, 190, 10, 18];
    if (!width) return;
    // Not as far as the ends of the curves, if that would press the crossing down.
    const top = Math.max(1e-9, Math.min(3.2 * solved.chernoff, Math.max(solved.klPolicyTeacher, solved.klTeacherPolicy)));
    const x = (alpha) => left + alpha * (width - 2 * left);
    const y = (kl) => height - bottom - (clamp(kl, 0, 1.2 * top) / top) * (height - bottom - 14);
    const steps = Array.from({ length: 81 }, (_, step) => [step / 80, qstarCore.klToParents(solved.axes, step / 80)]);
    const one = (which, role) => svg("path", { class: `qs-curve ${role}`, d: line(steps.map(([alpha, kls]) => [x(alpha), y(kls[which])])) });
    const level = y(solved.chernoff);
    set(curves, { viewBox: `0 0 ${width} ${height}`, height });
    curves.replaceChildren(
      svg("path", { class: "qs-axis", d: `M${left} ${height - bottom}H${width - left}` }),
      ...[0, 0.5, 1].map((value) => svg("text", { class: "qs-tick", x: x(value), y: height - 3, "text-anchor": "middle" }, String(value))),
      svg("path", { class: "qs-guide", d: `M${left} ${level}H${width - left}M${x(solved.alpha)} ${height - bottom}V15` }),
      one(0, "policy"), one(1, "teacher"),
      svg("path", { class: "qs-now", d: `M${x(at)} ${height - bottom}V15` }),
      svg("path", { class: "qs-star", d: shapes.star, transform: `translate(${x(solved.alpha)} ${level})` }),
      svg("text", { class: "qs-label qstar", x: x(solved.alpha), y: 11, "text-anchor": "middle" }, "α*"),
      svg("text", { class: "qs-label qstar", x: left + 2, y: level - 4 }, "C"),
    );
  }

  restore(saved);
  draw();
};
