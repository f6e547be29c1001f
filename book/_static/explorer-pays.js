// Does drafting pay? Speed-up of each scheme against the acceptance, with what was measured.
qstarExplorers.pays = (root, data, saved, keeper) => {
  const { button, canvas, choice, clamp, html, line, number, short, slider, svg, set, shapes, teller } = qstarTools;
  const SCHEMES = {
    alternating: { look: "qs-alternating", name: "alternating", mark: shapes.disc, sign: "●", line: "—" },
    coin: { look: "qs-coin", name: "coin", mark: shapes.star, sign: "★", line: "╌" },
    "one-sided": { look: "qs-one-sided", name: "one-sided", mark: shapes.square, sign: "■", line: "⋯" },
  };
  // [name, start, least, most, step, label, how it is said]
  const percent = (value) => `${number(100 * value, 0)} %`;
  const KNOBS = [
    ["accept", 0.9, 0, 1, 0.01, "acceptance of a parent’s draft", (x) => number(x, 2)],
    ["saved", 0.75, 0, 0.98, 0.01, "of its misses, the coin’s mixture keeps", percent],
    ["gamma", 1, 1, 8, 1, "draft length γ (alternating, one-sided)", (x) => number(x, 0)],
    ["stay", 0.5, 0, 0.9, 0.05, "chance that a coin’s proposer stays", (x) => number(x, 2)],
    ["ratio", 1, 0.1, 4, 0.05, "teacher’s forward over the policy’s", (x) => number(x, 2)],
    ["width", 0.05, 0, 0.5, 0.01, "cost of each further position", percent],
    ["overhead", 0, 0, 1, 0.02, "outside the models, a round", percent],
  ];
  const LEAST = 0.5; // times, at the foot of the plot
  const ASIDE = { alternating: -5, coin: 5, "one-sided": 0 }; // so that no mark hides another
  let knobs, machine; // machine -1: forwards as the sliders say

  function take(at) {
    machine = at;
    const cell = data.cells[at];
    if (!cell) return;
    const { policy, teacher, coin } = cell.accept;
    knobs.accept = short((policy + teacher) / 2);
    if (coin) knobs.saved = short(clamp(1 - (1 - coin) / (1 - knobs.accept), 0, 0.98));
    knobs.overhead = 0;
  }
  function restore(text) {
    knobs = Object.fromEntries(KNOBS.map(([name, start]) => [name, start]));
    const values = (text ?? "").split("_").map(Number);
    if (!text || values.length !== KNOBS.length + 1 || !values.every(Number.isFinite)) return take(data.start);
    machine = Number.isInteger(values[0]) && data.cells[values[0]] ? values[0] : -1;
    KNOBS.forEach(([name, , least, most], at) => {
      knobs[name] = clamp(values[at + 1], least, most);
    });
    knobs.gamma = Math.round(knobs.gamma);
  }
  const costs = () => {
    const cell = data.cells[machine];
    if (cell) return { policy: cell.seconds, teacher: cell.seconds, overhead: knobs.overhead * cell.seconds[1] };
    const at = (times) => ({ 1: times, 9: times * (1 + 8 * knobs.width) });
    return { policy: at(1), teacher: at(knobs.ratio), overhead: knobs.overhead };
  };
  const speedup = (scheme, accept, forwards) => {
    const coin = 1 - (1 - accept) * (1 - knobs.saved);
    const gamma = scheme === "coin" ? data.coinGamma : knobs.gamma;
    return qstarCore.expectedSpeedup({ policy: accept, teacher: accept, coin }, forwards, scheme, gamma, [knobs.stay, knobs.stay]);
  };
  // The least acceptance from which a scheme is faster than plain decoding.
  function breakEven(scheme, forwards) {
    const pays = (accept) => speedup(scheme, accept, forwards) > 1;
    if (!pays(1)) return "never";
    let [low, high] = [0, 1];
    if (pays(0)) return "always";
    for (let pass = 0; pass < 30; pass++) {
      const middle = (low + high) / 2;
      if (pays(middle)) high = middle;
      else low = middle;
    }
    return number(high, 2);
  }

  const plot = canvas("Speed-up over plain decoding against the acceptance probability", draw, "img");
  const picker = choice("Forwards", { "": [["-1", "as the sliders say"]], "as measured": data.cells.map(({ name }, at) => [String(at), name]) }, (value) => {
    take(Number(value));
    draw();
  });
  const sliders = Object.fromEntries(KNOBS.map(([name, , min, max, step, label, say]) => [name, slider(label, {
    min, max, step, say: (value) => say(Number(value)),
    set: (value) => {
      knobs[name] = value;
      draw();
    },
  })]));
  const rows = Object.fromEntries(Object.entries(SCHEMES).map(([scheme, { look, name, line, sign }]) => {
    const cells = [html("td"), html("td")];
    return [scheme, { row: html("tr", {}, html("th", { scope: "row", class: look }, `${line} ${sign} ${name}`), ...cells), cells }];
  }));
  const head = html("tr", {}, html("th", { scope: "col" }, "scheme"), html("th", { scope: "col" }, "times plain"), html("th", { scope: "col" }, "pays from"));
  const said = html("p", { class: "qs-key" });
  const { status, tell } = teller();
  root.append(
    html("div", { class: "qs-bar" }, picker.field, button("Reset", () => {
      restore("");
      draw();
    }), keeper.link),
    html("div", { class: "qs-columns" },
      html("div", {}, html("p", { class: "qs-key" }, "Times as fast as plain decoding, by acceptance. Marks: measured, with 95 % intervals; strong where the forwards chosen are theirs."), plot,
        html("table", {}, html("thead", {}, head), html("tbody", {}, ...Object.values(rows).map(({ row }) => row))), said),
      html("div", { class: "qs-stack" }, ...Object.values(sliders).map(({ field }) => field))),
    status,
  );

  function draw() {
    const width = plot.clientWidth;
    if (!knobs || !width) return;
    const forwards = costs();
    const [height, left, bottom] = [300, 30, 22];
    const steps = Array.from({ length: 101 }, (_, at) => at / 100);
    const curves = Object.keys(SCHEMES).map((scheme) => [scheme, steps.map((accept) => speedup(scheme, accept, forwards))]);
    const most = Math.max(2, ...curves.flatMap(([, values]) => values.filter((v) => v < 6)), ...data.cells.flatMap(({ points }) => points.map((p) => p.high)));
    const x = (accept) => left + accept * (width - left - 10);
    const y = (times) => height - bottom - ((clamp(times, LEAST, most) - LEAST) / (most - LEAST)) * (height - bottom - 10);
    const ticks = [0.5, 1, 1.5, 2, 2.5, 3, 4, 5].filter((at) => at <= most);
    const marks = data.cells.flatMap(({ points, accept }, at) => points.map(({ scheme, gamma, median, low, high }) => {
      const strong = at === machine && (scheme === "coin" || gamma === knobs.gamma);
      const place = x((accept.policy + accept.teacher) / 2) + ASIDE[scheme];
      return svg("g", { class: `qs-point ${SCHEMES[scheme].look} ${strong ? "qs-strong" : ""}` },
        svg("path", { d: `M${place} ${y(low)}V${y(high)}` }),
        svg("path", { d: SCHEMES[scheme].mark, transform: `translate(${place} ${y(median)}) scale(0.75)` }));
    }));
    set(plot, { viewBox: `0 0 ${width} ${height}`, height });
    plot.replaceChildren(
      svg("path", { class: "qs-axis", d: `M${left} 10V${height - bottom}H${width - 10}` }),
      ...ticks.map((at) => svg("text", { class: "qs-tick", x: left - 6, y: y(at) + 4, "text-anchor": "end" }, String(at))),
      ...[0, 0.25, 0.5, 0.75, 1].map((at) => svg("text", { class: "qs-tick", x: x(at), y: height - 5, "text-anchor": "middle" }, String(at))),
      svg("path", { class: "qs-guide", d: `M${left} ${y(1)}H${width - 10}` }),
      svg("path", { class: "qs-now", d: `M${x(knobs.accept)} ${height - bottom}V10` }),
      ...curves.map(([scheme, values]) => svg("path", { class: `qs-curve ${SCHEMES[scheme].look}`, d: line(values.map((times, at) => [x(steps[at]), y(times)])) })),
      ...marks.filter((mark) => !mark.classList.contains("qs-strong")), ...marks.filter((mark) => mark.classList.contains("qs-strong")),
    );
    const now = Object.fromEntries(Object.keys(SCHEMES).map((scheme) => [scheme, speedup(scheme, knobs.accept, forwards)]));
    const best = Object.keys(now).reduce((one, other) => (now[other] > now[one] ? other : one));
    for (const [scheme, { row, cells }] of Object.entries(rows)) {
      cells[0].textContent = number(now[scheme], 2);
      cells[1].textContent = breakEven(scheme, forwards);
      row.classList.toggle("qs-best", scheme === best && now[scheme] > 1);
    }
    for (const [name, { show, input, field }] of Object.entries(sliders)) {
      show(knobs[name]);
      input.disabled = machine >= 0 && (name === "ratio" || name === "width");
      field.classList.toggle("qs-off", input.disabled);
    }
    picker.select.value = String(machine);
    said.textContent = data.cells[machine]?.said ?? "";
    tell(`${Object.entries(now).map(([scheme, times]) => `${scheme} ${number(times, 2)}`).join(", ")} times as fast as plain decoding`);
    keeper.write([machine, ...KNOBS.map(([name]) => short(knobs[name]))].join("_"));
  }

  restore(saved);
  const start = JSON.stringify([data.start, knobs]);
  const write = keeper.write;
  keeper.write = (text) => write(saved || JSON.stringify([machine, knobs]) !== start ? text : "");
  draw();
};
