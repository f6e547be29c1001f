// A recorded decode: who proposed each token, whether it was kept, and what both models thought.
qstarExplorers.spoken = (root, data, saved, keeper) => {
  const { button, choice, clamp, html, number, teller } = qstarTools;
  const LAWS = [["policy", "policy"], ["q*", "qstar"], ["teacher", "teacher"]];
  let [text, at] = (saved ?? "0_3").split("_").map(Number);
  if (!data.texts[text]) text = 0;
  const tokens = () => data.texts[text].tokens;
  at = clamp(Math.round(at) || 0, 0, tokens().length - 1);

  const picker = choice("Text", { "": data.texts.map(({ name }, at) => [String(at), name]) }, (value) => {
    text = Number(value);
    at = 0;
    write();
  });
  const said = html("div", { class: "qs-spoken", role: "group", "aria-label": "the decoded text, token by token" });
  const facts = html("p", {});
  const laws = html("div", { class: "qs-laws" });
  const { status, tell } = teller();
  const key = [["policy", "policy proposed, kept"], ["teacher", "teacher proposed, kept"], ["qstar", "replaced by a token of q*"]];
  root.append(
    html("div", { class: "qs-bar" }, picker.field, keeper.link),
    html("p", { class: "qs-key" }, ...key.flatMap(([role, text]) => [html("span", { class: `qs-token ${role}` }, text), " "])),
    said, facts, laws, status,
  );
  const word = (text) => text.replaceAll("\n", "⏎");
  const fate = ({ by, kept }) =>
    by === "none" ? "nobody proposed; drawn from q*" : `the ${by} proposed, ${kept ? "kept" : "replaced by a token of the residual"}`;

  // The text is written once; then marks and numbers follow the token that is looked at.
  function write() {
    picker.select.value = String(text);
    said.replaceChildren(...tokens().map((token, index) => {
      const one = button(word(token.text), () => look(index));
      one.className = `qs-token ${token.kept && token.by !== "none" ? token.by : "qstar"}`;
      one.onpointerenter = ({ pointerType }) => pointerType === "mouse" && look(index);
      one.onfocus = () => look(index);
      one.onkeydown = ({ key }) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
        if (step) said.children[clamp(index + step, 0, tokens().length - 1)].focus();
      };
      return one;
    }));
    look(at);
  }
  function look(index) {
    at = index;
    [...said.children].forEach((one, index) => {
      one.tabIndex = index === at ? 0 : -1;
      one.setAttribute("aria-pressed", index === at);
    });
    const token = tokens()[at];
    const accept = token.accept === null ? "" : `; chance of being kept ${number(token.accept, 2)}`;
    facts.textContent = `“${word(token.text).trim()}”: ${fate(token)}${accept}. α* ${number(token.alpha, 2)}, C ${number(token.chernoff)} nats.`;
    laws.replaceChildren(...LAWS.map(([name, role], law) => {
      const top = token.top[law];
      const rows = top.filter(([text], row) => row < top.length - 1 || !top.slice(0, -1).some(([other]) => other === text));
      return html("table", { class: role }, html("caption", {}, name), html("tbody", {}, ...rows.map(([text, p]) =>
        html("tr", text === token.text ? { class: "qs-best" } : {}, html("th", { scope: "row" }, word(text)), html("td", { style: `--p: ${100 * p}%` }, number(p))))));
    }));
    tell(facts.textContent);
    keeper.write(text === 0 && at === 3 ? "" : `${text}_${at}`);
  }
  write();
};
