// Repairs of the theme that a style sheet cannot make.
document.addEventListener("DOMContentLoaded", () => {
  const _ = (text) => globalThis.qstarWords?.[text] ?? text;
  // Buttons that show only an icon say what they do.
  for (const button of document.querySelectorAll("button.search-button, button.search-button__button")) {
    button.setAttribute("aria-label", _("Search"));
  }
  for (const summary of document.querySelectorAll(".bd-sidebar-primary details > summary")) {
    const parent = summary.closest("li").querySelector("a").textContent.trim();
    summary.setAttribute("aria-label", _("The pages of {}").replace("{}", parent));
  }
  // The logo and the table of contents are a landmark too.
  const sidebar = document.querySelector(".bd-sidebar-primary");
  sidebar?.setAttribute("role", "complementary");
  sidebar?.setAttribute("aria-label", _("The book"));
  // Boxes that scroll sideways can be scrolled from the keyboard, and show that there is more.
  const wide = ".pst-scrollable-table-container, table.table, div.math > div, .qs-figure, .text_html, pre";
  const boxes = [...document.querySelectorAll(`.bd-article :is(${wide})`)];
  const look = (some) => {
    const sizes = some.map((box) => [box.scrollWidth - box.clientWidth, box.scrollLeft]);
    some.forEach((box, at) => {
      const [over, left] = sizes[at];
      if (over > 0) box.tabIndex = 0;
      box.classList.toggle("qs-more", over - left > 1);
    });
  };
  for (const box of boxes) box.addEventListener("scroll", () => look([box]), { passive: true });
  // A formula in a line does not break; one that is wider than its text scrolls.
  const formulas = [...document.querySelectorAll(".bd-article :is(p, li, dd, figcaption) math")]
    .map((formula) => formula.closest(".qs-together") ?? formula)
    .map((formula) => [formula, formula.closest("p, li, dd, figcaption")]);
  const fit = () => {
    const wider = formulas.map(([formula, text]) =>
      Math.max(formula.scrollWidth, formula.getBoundingClientRect().width) > text.clientWidth);
    formulas.forEach(([formula], at) => {
      if (wider[at]) formula.tabIndex = 0;
      formula.classList.toggle("qs-wide", wider[at]);
    });
  };
  const again = () => {
    fit();
    look(boxes);
  };
  again();
  window.addEventListener("load", again);
  window.addEventListener("resize", again);
  // The meaning of a word stays within the window, and Escape shuts it.
  const words = [...document.querySelectorAll(".qs-word")];
  const show = ({ currentTarget: word }) => {
    word.classList.remove("qs-shut");
    word.style.setProperty("--shift", "0px");
    const over = word.querySelector(".qs-tip").getBoundingClientRect().right - document.body.clientWidth;
    if (over > 0) word.style.setProperty("--shift", `${-over - 8}px`);
  };
  for (const word of words) {
    word.addEventListener("mouseenter", show);
    word.addEventListener("focusin", show);
  }
  document.addEventListener("keydown", ({ key }) => {
    if (key === "Escape") for (const word of words) word.classList.add("qs-shut");
  });
  // The same place in the other language.
  for (const link of document.querySelectorAll("a.qs-edition")) {
    link.addEventListener("click", () => { link.hash = location.hash; });
  }
  // The download button downloads, and does not open a tab full of JSON.
  for (const link of document.querySelectorAll("a.btn-download-source-button, a.btn-download-notebook-button")) {
    link.setAttribute("download", "");
    link.removeAttribute("target");
  }
});
