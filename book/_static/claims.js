// The filter of the claims register: without this script the page is the plain table.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table.qs-register");
  if (!table) return;
  const _ = (text) => globalThis.qstarWords?.[text] ?? text;
  const rows = [...table.tBodies[0].rows];
  const facets = { verdict: _("Verdict"), kind: _("Kind"), chapter: _("Chapter") };
  const value = (row, facet) => {
    const prefix = `of-${facet}-`;
    return [...row.classList].find((name) => name.startsWith(prefix)).slice(prefix.length);
  };
  const words = (row, facet) => {
    if (facet === "verdict") return row.querySelector(".verdict").textContent;
    if (facet === "kind") return row.querySelector(".qs-kind").textContent;
    return row.querySelector(".cell-link").textContent;
  };

  const form = document.createElement("form");
  form.className = "qs-filter";
  form.setAttribute("aria-label", _("Filter the claims"));
  const selects = {};
  for (const [facet, label] of Object.entries(facets)) {
    const options = new Map(rows.map((row) => [value(row, facet), words(row, facet)]));
    const select = document.createElement("select");
    select.name = facet;
    select.add(new Option(_("all"), ""));
    for (const [key, text] of [...options].sort()) {
      const count = rows.filter((row) => value(row, facet) === key).length;
      select.add(new Option(`${text} (${count})`, key));
    }
    const field = document.createElement("label");
    field.append(label, select);
    form.append(field);
    selects[facet] = select;
  }
  const reset = document.createElement("button");
  reset.type = "reset";
  reset.textContent = _("Show all");
  const status = document.createElement("p");
  status.setAttribute("role", "status");
  form.append(reset, status);

  const update = () => {
    let shown = 0;
    for (const row of rows) {
      const fits = Object.entries(selects).every(
        ([facet, select]) => !select.value || select.value === value(row, facet),
      );
      row.hidden = !fits;
      shown += fits;
    }
    status.textContent = _("{shown} of {all} claims").replace("{shown}", shown).replace("{all}", rows.length);
  };
  // A link to a verdict sets the filter; a link to a row must find it shown.
  const follow = () => {
    const target = decodeURIComponent(location.hash.slice(1));
    const verdict = target.startsWith("verdict-") ? target.slice("verdict-".length) : "";
    if (verdict) {
      form.reset();
      selects.verdict.value = verdict;
      update();
    } else if (rows.some((row) => row.id === target && row.hidden)) {
      form.reset();
      update();
      document.getElementById(target).scrollIntoView();
    }
  };
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  window.addEventListener("hashchange", follow);
  (table.closest(".pst-scrollable-table-container") ?? table).before(form);
  update();
  follow();
});
