// A vocabulary of three to ten tokens: bars, for three the simplex, and a sampler step by step.
qstarExplorers.tokens = (root, data, saved, keeper) => {
  const { button, canvas, choice, clamp, handle, html, line, number, reduced, set, shapes, short, slider, svg, teller } = qstarTools;
  const { sum } = qstarCore;
  const NAMES = "ABCDEFGHIJ";
  const PARENTS = ["policy", "teacher"];
  const LEAST = 0.001;
  const RULES = ["exact", "source", "patched", "block"];
  let preset, rows, rule, count; // rows: the policy's and the teacher's probabilities
  let logs, solved, q, law;
  let chance, tally, tokens, rounds, kept, tested, history, pending, shown; // the sampler's

  // --- The state
  function load(at) {
    preset = at;
    rows = [data.presets[at].policy, data.presets[at].teacher].map((row) => [...row]);
  }
  function restore(text) {
    const [first, second, at, ...numbers] = (text ?? "").split("_");
    rule = RULES.includes(first) ? first : "source";
    count = clamp(Math.round(Number(second)) || 2, 1, 8);
    const values = numbers.map(Number);
    const size = values.length / 2;
    const named = /^p\d+$/.test(at) && Number(at.slice(1)) < data.presets.length;
    if (at === "x" && Number.isInteger(size) && size > 2 && size < 11 && values.every((x) => x > 0)) {
      preset = -1;
      rows = [values.slice(0, size), values.slice(size)].map(normal);
    } else load(named ? Number(at.slice(1)) : 0);
  }
  function save() {
    const start = preset === 0 && rule === "source" && count === 2;
    const pair = preset < 0 ? ["x", ...rows.flat().map((x) => short(x))] : [`p${preset}`];
    keeper.write(start ? "" : [rule, count, ...pair].join("_"));
  }
  const normal = (row) => {
    const floored = row.map((x) => Math.max(LEAST, x));
    return floored.map((x) => x / sum(floored));
  };
  function put(who, token, value) {
    const row = rows[who];
    const left = 1 - clamp(value, LEAST, 1 - LEAST * (row.length - 1));
    const others = 1 - row[token];
    rows[who] = normal(row.map((x, at) => (at === token ? 1 - left : (x * left) / others)));
    changed();
  }
  function changed() {
    preset = -1;
    renew();
  }
  function renew() {
    logs = rows.map((row) => row.map(Math.log));
    solved = qstarCore.solveRows(...logs);
    q = qstarCore.rowMean(...logs, solved.alpha);
    clear();
  }
  function clear() {
    law = qstarCore.lawOfRule(rows[0], q, count, rule === "block" ? "exact" : rule);
    chance = qstarCore.seededChance(1);
    tally = q.map(() => 0);
    tokens = rounds = kept = tested = 0;
    history = [];
    pending = null;
    shown = [];
    draw();
  }

  // --- The sampler: a round is made at once, and shown choice by choice
  const of = (where) => (where === rows[0] ? "policy" : where === q ? "q*" : "residual");
  function makeRound() {
    const events = [];
    const recording = {
      draw: (from) => {
        const token = chance.draw(from);
        events.push({ from: of(from), token });
        return token;
      },
      keep: (probability) => {
        const keeps = chance.keep(probability);
        events.push({ probability, keeps });
        return keeps;
      },
    };
    const made = emit(recording);
    return { events, made };
  }
  const emit = (chance) => {
    if (rule === "block") {
      const round = qstarCore.verifyBlock(chance, rows[0], q, count);
      return { tokens: round.tokens, kept: round.accepted, tested: Math.min(round.accepted + 1, count) };
    }
    const pick = qstarCore.pickToken(chance, rows[0], q, count, rule);
    return { tokens: [pick.token], kept: Number(pick.accepted), tested: pick.tested };
  };
  function finish(made) {
    for (const token of made.tokens) tally[token]++;
    tokens += made.tokens.length;
    rounds++;
    kept += made.kept;
    tested += made.tested;
    const last = history.at(-1)?.[0] ?? 8;
    if (tokens >= last * 1.15) history.push([tokens, distance()]);
  }
  const distance = () => sum(q.map((x, at) => Math.abs(x - tally[at] / tokens))) / 2;
  function step() {
    if (!pending) {
      pending = makeRound();
      shown = [];
    }
    shown.push(pending.events[shown.length]);
    if (shown.length === pending.events.length) {
      finish(pending.made);
      shown.push({ emits: pending.made.tokens });
      pending = null;
    }
    draw();
  }
  function round() {
    do step(); while (pending);
  }
  function many(times) {
    if (pending) round();
    for (let at = 0; at < times; at++) finish(emit(chance));
    shown = [];
    draw();
  }
  let running = 0;
  function run() {
    if (running) {
      cancelAnimationFrame(running);
      running = 0;
    } else if (reduced()) many(20000);
    else {
      const frame = () => {
        many(Math.max(1, Math.min(2000, tokens >> 5)));
        running = tokens < 1e6 && root.isConnected ? requestAnimationFrame(frame) : 0;
        runner.textContent = running ? "Pause" : "Run";
      };
      running = requestAnimationFrame(frame);
    }
    runner.textContent = running ? "Pause" : "Run";
  }

  // --- What is on the page
  const bars = canvas("The probabilities of the tokens", draw);
  const simplex = canvas("The simplex of three tokens", draw);
  const errors = canvas("Distance from q* against the number of tokens drawn", draw, "img");
  const picker = choice("Pair", { "": [["-1", "your own"], ...data.presets.map(({ name }, at) => [String(at), name])] }, (value) => {
    if (Number(value) < 0) return;
    load(Number(value));
    renew();
  });
  const size = choice("Tokens", { "": [...NAMES].slice(2).map((_, at) => [String(at + 3), String(at + 3)]) }, (value) => {
    const wanted = Number(value);
    rows = rows.map((row) => normal(Array.from({ length: wanted }, (_, at) => row[at] ?? 1 / wanted)));
    changed();
  });
  const ruler = choice("Rule", { "": [
    ["source", "the source’s loop (biased)"],
    ["patched", "its last line mended"],
    ["exact", "a residual after each rejection (exact)"],
    ["block", "a block of drafts, verified (exact)"],
  ] }, (value) => {
    rule = value;
    clear();
  });
  const drafts = slider("candidates, or drafts, a round", {
    min: 1, max: 8, step: 1, say: String,
    set: (value) => {
      count = value;
      clear();
    },
  });
  const runner = button("Run", run);
  const trace = html("ol", { class: "qs-steps" });
  const cells = {};
  const i = (text, role) => html("i", { class: role }, text);
  const row = (key, ...name) => html("tr", {}, html("th", { scope: "row" }, ...name), (cells[key] = html("td")));
  const star = () => i("q*", "qstar");
  const pairTable = html("table", {}, html("tbody", {},
    row("alpha", "α*, the exponent on the policy"),
    row("chernoff", "C = KL(", star(), " ‖ either)"),
    row("accept", "chance that a draft of the ", i("policy", "policy"), " is kept"),
  ));
  const runTable = html("table", {}, html("tbody", {},
    row("tokens", "tokens, in how many rounds"),
    row("rate", "drafts kept of those tested"),
    row("bias", "TV of the rule’s distribution from ", star()),
    row("distance", "TV of what was drawn from ", star()),
    row("noise", "what chance alone would leave"),
  ));
  const { status, tell } = teller();
  const side = html("div", {}, simplex, pairTable);
  root.append(
    html("div", { class: "qs-bar" }, picker.field, size.field, button("Reset", () => {
      restore("");
      renew();
    }), keeper.link),
    html("div", { class: "qs-columns" },
      html("div", {}, bars, html("p", { class: "qs-key" }, html("span", { class: "policy" }, "● policy"), " ", html("span", { class: "teacher" }, "■ teacher"), " ", html("span", { class: "qstar" }, "▮ q*"), " ● drawn, ", html("span", {}, "–"), " what the rule draws in the long run. Drag ● and ■.")),
      side),
    html("div", { class: "qs-bar qs-second" }, ruler.field, drafts.field),
    html("div", { class: "qs-bar" }, button("Step", step), button("Round", round), button("1,000 rounds", () => many(1000)), runner, button("Clear", clear)),
    trace,
    html("div", { class: "qs-columns" }, html("div", {}, html("p", { class: "qs-key" }, html("span", { class: "qstar" }, "— TV from q* of what was drawn"), ", by tokens; ⋯ what chance alone would leave"), errors), runTable),
    status,
  );

  const bar = {};
  const barMarks = svg("g");
  const barHandles = svg("g");
  bars.append(barMarks, barHandles);
  const corner = {};
  const plane = svg("g");
  const points = PARENTS.map((name, who) =>
    handle(simplex, { path: name === "policy" ? shapes.disc : shapes.square, class: name }, `${name} in the simplex`, {
      move: (x, y) => place(who, x, y),
      nudge: (right, up, far) => {
        const [x, y] = points[who].place;
        const reach = (far ? 0.1 : 0.01) * corner.side;
        place(who, x + right * reach, y - up * reach);
      },
    }),
  );
  simplex.append(plane, ...points);
  function place(who, x, y) {
    const up = (corner.bottom - y) / corner.height;
    const right = (x - corner.left) / corner.side - up / 2;
    rows[who] = normal([up, 1 - up - right, right]);
    changed();
  }
  const spot = ([top, , right]) => [corner.left + (right + top / 2) * corner.side, corner.bottom - top * corner.height];

  // --- Drawing
  function drawBars() {
    const [width, height, bottom] = [bars.clientWidth, 250, 22];
    if (!width) return;
    const most = Math.max(0.25, ...rows.flat(), ...q) * 1.05;
    const y = (p) => height - bottom - (p / most) * (height - bottom - 12);
    const group = width / q.length;
    const thick = Math.min(22, group / 4);
    const x = (token, at) => group * (token + 0.5) + (at - 1) * thick * 1.15;
    Object.assign(bar, { y, most, height, bottom });
    set(bars, { viewBox: `0 0 ${width} ${height}`, height });
    const marks = [svg("path", { class: "qs-axis", d: `M0 ${height - bottom}H${width}` })];
    q.forEach((chanceOf, token) => {
      [rows[0][token], rows[1][token], chanceOf].forEach((p, at) => {
        const role = [...PARENTS, "qstar"][at];
        marks.push(svg("rect", { class: `qs-fill ${role}`, x: x(token, at) - thick / 2, y: y(p), width: thick, height: Math.max(0, height - bottom - y(p)) }));
      });
      const at = x(token, 2);
      marks.push(svg("path", { class: "qs-now", d: `M${at - thick / 2 - 3} ${y(law[token])}h${thick + 6}` }));
      if (tokens) marks.push(svg("circle", { class: "qs-drawn", cx: at, cy: y(tally[token] / tokens), r: 4 }));
      marks.push(svg("text", { class: "qs-tick", x: group * (token + 0.5), y: height - 6, "text-anchor": "middle" }, NAMES[token]));
    });
    barMarks.replaceChildren(...marks);
    if (barHandles.childElementCount !== 2 * q.length) {
      barHandles.replaceChildren(...PARENTS.flatMap((name, who) => q.map((_, token) =>
        handle(bars, { path: name === "policy" ? shapes.disc : shapes.square, class: `${name} qs-fine` }, `${name}, token ${NAMES[token]}`, {
          move: (_, y) => put(who, token, (bar.most * (bar.height - bar.bottom - y)) / (bar.height - bar.bottom - 12)),
          nudge: (right, up, far) => put(who, token, rows[who][token] + (right + up) * (far ? 0.1 : 0.01)),
        }),
      )));
      for (const mark of barHandles.children) set(mark, { "aria-valuemin": 0, "aria-valuemax": 1 });
    }
    [...barHandles.children].forEach((mark, at) => {
      const [who, token] = [Math.floor(at / q.length), at % q.length];
      mark.put(x(token, who), y(rows[who][token]), rows[who][token], number(rows[who][token]));
    });
  }

  function drawSimplex() {
    const three = q.length === 3;
    simplex.style.display = three ? "" : "none";
    const width = simplex.clientWidth;
    if (!three || !width) return;
    const edge = 22;
    const across = Math.min(width - 2 * edge, 300);
    const height = (across * Math.sqrt(3)) / 2;
    Object.assign(corner, { side: across, height, left: (width - across) / 2, bottom: height + edge });
    set(simplex, { viewBox: `0 0 ${width} ${height + 2 * edge}`, height: height + 2 * edge });
    const [policy, teacher] = rows;
    const ratio = policy.map((x, at) => Math.log(x / teacher[at]));
    const crossing = [[0, 1], [1, 2], [2, 0]].flatMap(([i, j]) => {
      if (ratio[i] * ratio[j] >= 0) return [];
      const share = ratio[i] / (ratio[i] - ratio[j]);
      const point = [0, 0, 0];
      point[i] = 1 - share;
      point[j] = share;
      return [spot(point)];
    });
    // The edge of a KL ball, ray by ray from its centre: both kinds of ball are convex.
    const ball = (centre, divergence) => Array.from({ length: 97 }, (_, at) => {
      const turn = (at / 96) * 2 * Math.PI;
      const [right, up] = [Math.cos(turn), (Math.sin(turn) * 2) / Math.sqrt(3)];
      const way = [up, -up / 2 - right, right - up / 2];
      const most = Math.min(...way.map((d, i) => (d < 0 ? -centre[i] / d : Infinity)));
      let [low, high] = [0, most];
      const there = (reach) => centre.map((c, i) => Math.max(0, c + reach * way[i]));
      for (let pass = 0; pass < 36; pass++) {
        const middle = (low + high) / 2;
        if (divergence(there(middle)) < solved.chernoff) low = middle;
        else high = middle;
      }
      return spot(there(low));
    });
    const steps = Array.from({ length: 61 }, (_, at) => spot(qstarCore.rowMean(...logs, at / 60)));
    const corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]].map(spot);
    const [x, y] = spot(q);
    const told = (at, dx, dy, anchor) => svg("text", { class: "qs-tick", x: corners[at][0] + dx, y: corners[at][1] + dy, "text-anchor": anchor }, NAMES[at]);
    plane.replaceChildren(
      svg("path", { class: "qs-axis", d: `${line(corners)}Z` }),
      told(0, 0, -6, "middle"), told(1, -6, 12, "end"), told(2, 6, 12, "start"),
      svg("path", { class: "qs-ball qstar", d: `${line(ball(q, (r) => qstarCore.kl(q, r)))}Z` }),
      svg("path", { class: "qs-circle policy", d: `${line(ball(policy, (r) => qstarCore.kl(r, policy)))}Z` }),
      svg("path", { class: "qs-circle teacher", d: `${line(ball(teacher, (r) => qstarCore.kl(r, teacher)))}Z` }),
      svg("path", { class: "qs-guide", d: crossing.length > 1 ? line(crossing) : "" }),
      svg("path", { class: "qs-curve qstar", d: line(steps) }),
      svg("path", { class: "qs-star", d: shapes.star, transform: `translate(${x} ${y})` }),
    );
    points.forEach((mark, who) => {
      const [top, left, right] = rows[who];
      mark.put(...spot(rows[who]), top, `A ${number(top, 2)}, B ${number(left, 2)}, C ${number(right, 2)}`);
    });
  }

  function drawErrors() {
    const [width, height, left, bottom] = [errors.clientWidth, 170, 40, 20];
    if (!width) return;
    const [most, least, last] = [0.5, 1e-4, 6];
    const x = (n) => left + ((Math.log10(n) - 1) / (last - 1)) * (width - left - 8);
    const y = (tv) => 8 + ((Math.log10(most) - Math.log10(clamp(tv, least, most))) / Math.log10(most / least)) * (height - bottom - 8);
    const bias = tvOfRule();
    set(errors, { viewBox: `0 0 ${width} ${height}`, height });
    errors.replaceChildren(
      svg("path", { class: "qs-axis", d: `M${left} 8V${height - bottom}H${width - 8}` }),
      ...[1, 2, 3, 4, 5, 6].map((power) => svg("text", { class: "qs-tick", x: x(10 ** power), y: height - 5, "text-anchor": power === 6 ? "end" : "middle" }, ["10", "100", "1,000", "10k", "100k", "1M"][power - 1])),
      ...[0.1, 0.01, 0.001].map((tv) => svg("text", { class: "qs-tick", x: left - 4, y: y(tv) + 4, "text-anchor": "end" }, String(tv))),
      svg("path", { class: "qs-guide", d: line([10, 1e6].map((n) => [x(n), y(noise(n))])) }),
      ...(bias > least ? [svg("path", { class: "qs-now qs-dashed", d: `M${left} ${y(bias)}H${width - 8}` }), svg("text", { class: "qs-label", x: width - 8, y: y(bias) + 14, "text-anchor": "end" }, "the rule’s bias")] : []),
      svg("path", { class: "qs-curve qstar", d: history.length > 1 ? line(history.map(([n, tv]) => [x(clamp(n, 10, 1e6)), y(tv)])) : "" }),
    );
  }
  const tvOfRule = () => sum(q.map((x, at) => Math.abs(x - law[at]))) / 2;
  // E|frequency - p| is about sqrt(2 p (1 - p) / (pi n)).
  const noise = (n) => sum(q.map((p) => Math.sqrt((2 * p * (1 - p)) / (Math.PI * n)))) / 2;

  function drawTrace() {
    const said = shown.map((event) => {
      if (event.emits) return html("li", { class: "qs-emits" }, `emits ${event.emits.map((at) => NAMES[at]).join(" ")}`);
      if (event.from === "policy") return html("li", { class: "policy" }, `policy drafts ${NAMES[event.token]}`);
      if (event.from) return html("li", { class: "qstar" }, `drawn from ${event.from === "q*" ? "q*" : "the residual"}: ${NAMES[event.token]}`);
      return html("li", {}, `kept with probability ${number(event.probability, 2)}: ${event.keeps ? "yes" : "no"}`);
    });
    trace.replaceChildren(...(said.length ? said : [html("li", {}, "Step follows one round, choice by choice.")]));
    if (shown.length) tell(said.at(-1).textContent);
  }

  function draw() {
    if (!q || !bars.clientWidth) return;
    drawBars();
    drawSimplex();
    drawErrors();
    drawTrace();
    picker.select.value = String(preset);
    size.select.value = String(q.length);
    ruler.select.value = rule;
    drafts.show(count);
    const values = {
      alpha: number(solved.alpha),
      chernoff: `${number(solved.chernoff)} nats`,
      accept: number(qstarCore.overlap(rows[0], q)),
      tokens: `${tokens.toLocaleString("en")} in ${rounds.toLocaleString("en")}`,
      rate: tested ? number(kept / tested) : "–",
      bias: number(tvOfRule(), 4),
      distance: tokens ? number(distance(), 4) : "–",
      noise: tokens ? number(noise(tokens), 4) : "–",
    };
    for (const [key, text] of Object.entries(values)) cells[key].textContent = text;
    if (!shown.length) tell(`alpha star ${values.alpha}, C ${values.chernoff}; ${values.tokens} rounds, total variation from q star ${values.distance}`);
    save();
  }

  restore(saved);
  renew();
};
