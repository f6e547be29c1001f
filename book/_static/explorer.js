// What the explorers share: elements, handles, sliders, numbers, and their state in the address.
// An explorer is a function in `qstarExplorers`; the page holds <div class="qs-explorer"
// data-explorer="NAME"> with its data as JSON in it, and a picture for readers without scripts.
const qstarExplorers = {};

const qstarTools = (() => {
  const _ = (text, ...parts) => {
    const said = globalThis.qstarWords?.[text] ?? text;
    return parts.reduce((whole, part) => whole.replace("{}", part), said);
  };
  function make(namespace, tag, attributes = {}, ...children) {
    const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
    set(node, attributes);
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  function set(node, attributes) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === null || value === false) node.removeAttribute(name);
      else node.setAttribute(name, value === true ? "" : value);
    }
    return node;
  }
  const html = (tag, ...rest) => make("", tag, ...rest);
  const svg = (tag, ...rest) => make("http://www.w3.org/2000/svg", tag, ...rest);

  const number = (value, digits = 3) =>
    Number.isFinite(value)
      ? (Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits).replace("-", "−")
      : Number.isNaN(value) ? "–" : "∞";
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const short = (value) => Number(value.toPrecision(5));
  const line = (points) =>
    points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  let made = 0;
  const unique = (label) => `qs-${++made}-${label.replace(/\W+/g, "-")}`;

  // A labelled slider; `say` is what its value is called.
  function slider(label, { min, max, step, say, set: change, ...rest }) {
    const id = unique(label);
    const output = html("output", { for: id });
    const input = html("input", { type: "range", id, min, max, step, ...rest });
    const show = (value) => {
      input.value = value;
      const said = say(value);
      output.textContent = said;
      input.setAttribute("aria-valuetext", said);
    };
    input.addEventListener("input", () => change(Number(input.value)));
    const field = html("div", { class: "qs-slider" }, html("label", { for: id }, label), output, input);
    return { field, input, show };
  }

  function choice(label, groups, change) {
    const id = unique(label);
    const select = html("select", { id, onchange: () => change(select.value) });
    for (const [group, options] of Object.entries(groups)) {
      const listed = options.map(([value, text]) => html("option", { value }, text));
      select.append(...(group ? [html("optgroup", { label: group }, ...listed)] : listed));
    }
    const field = html("div", { class: "qs-choice" }, html("label", { for: id }, label), select);
    return { field, select };
  }

  const button = (text, press) => html("button", { type: "button", onclick: press }, text);

  // A mark that can be dragged, and moved by the arrow keys: `move(x, y)` in pixels of the drawing,
  // `nudge(right, up, far)` by keys.
  function handle(canvas, shape, label, { move, nudge, done = () => {} }) {
    const mark = svg(
      "g",
      { class: `qs-handle ${shape.class}`, tabindex: 0, role: "slider", "aria-label": label },
      svg("circle", { r: 15, class: "qs-reach" }),
      svg("path", { d: shape.path }),
    );
    const at = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect();
      return [clientX - box.left, clientY - box.top];
    };
    let offset = null;
    set(mark, {
      onpointerdown: (event) => {
        if (event.button) return;
        mark.setPointerCapture(event.pointerId);
        const [x, y] = at(event);
        offset = [mark.place[0] - x, mark.place[1] - y];
        mark.focus({ preventScroll: true });
        event.preventDefault();
      },
      onpointermove: (event) => {
        if (!offset) return;
        const [x, y] = at(event);
        move(x + offset[0], y + offset[1]);
      },
      ontouchstart: (event) => event.preventDefault(), // else the page scrolls along
      onlostpointercapture: () => {
        offset = null;
        done();
      },
      onkeydown: (event) => {
        const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
        const step = steps[event.key];
        if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        nudge(...step, event.shiftKey);
        done();
      },
    });
    mark.put = (x, y, value, said) => {
      mark.place = [x, y];
      set(mark, {
        transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
        "aria-valuenow": short(value),
        "aria-valuetext": said,
      });
    };
    return mark;
  }
  const shapes = {
    disc: "M6 0A6 6 0 1 1 -6 0A6 6 0 1 1 6 0Z",
    square: "M-5.5 -5.5H5.5V5.5H-5.5Z",
    diamond: "M0 -6L6 0L0 6L-6 0Z",
    small: "M4 0A4 4 0 1 1 -4 0A4 4 0 1 1 4 0Z",
    star: "M0 -8L2 -2.6L7.6 -2.5L3.2 1L4.7 6.5L0 3.3L-4.7 6.5L-3.2 1L-7.6 -2.5L-2 -2.6Z",
  };

  // A drawing as wide as its place, redrawn when that changes: letters keep their size.
  function canvas(label, draw, role = "group") {
    const drawing = svg("svg", { role, "aria-label": label });
    new ResizeObserver(() => draw()).observe(drawing);
    return drawing;
  }

  const reduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  // The state of an explorer is one word in the address, after its name. All share one address:
  // what one has changed is not lost when another writes before the address has followed.
  const query = new URLSearchParams(location.search);
  let following = 0;
  function keeper(name, root) {
    const link = html("a", { class: "qs-link" }, _("Link to this state"));
    const write = (text) => {
      if (text) query.set(name, text);
      else query.delete(name);
      const said = `${location.pathname}${query.size ? `?${query}` : ""}`;
      link.href = `${said}#${root.id}`;
      clearTimeout(following);
      following = setTimeout(() => {
        try {
          history.replaceState(history.state, "", said + location.hash);
        } catch { /* a browser that keeps no state for files: the link has it */ }
      }, 300);
    };
    return { link, write };
  }

  // What a screen reader is told once nothing has moved for a while.
  function teller() {
    const status = html("p", { role: "status", class: "qs-told" });
    let waiting = 0;
    const tell = (text) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { status.textContent = text; }, 700);
    };
    return { status, tell };
  }

  function start() {
    for (const root of document.querySelectorAll(".qs-explorer")) {
      const name = root.dataset.explorer;
      const explorer = qstarExplorers[name];
      if (!explorer || root.classList.contains("qs-live")) continue;
      const data = JSON.parse(root.querySelector("script").textContent);
      root.classList.add("qs-live");
      explorer(root, data, query.get(name), keeper(name, root));
    }
  }
  document.addEventListener("DOMContentLoaded", start);

  return {
    _, button, canvas, choice, clamp, handle, html, line, number, reduced, set, shapes, short, slider,
    svg, teller,
  };
})();
