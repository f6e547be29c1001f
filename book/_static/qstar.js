// Repairs of the theme that a style sheet cannot make.
document.addEventListener("DOMContentLoaded", () => {
  // Buttons that show only an icon say what they do.
  for (const button of document.querySelectorAll("button.search-button, button.search-button__button")) {
    button.setAttribute("aria-label", "Search");
  }
  for (const summary of document.querySelectorAll(".bd-sidebar-primary details > summary")) {
    const parent = summary.closest("li").querySelector("a").textContent.trim();
    summary.setAttribute("aria-label", `The pages of ${parent}`);
  }
  // The logo and the table of contents are a landmark too.
  const sidebar = document.querySelector(".bd-sidebar-primary");
  sidebar?.setAttribute("role", "complementary");
  sidebar?.setAttribute("aria-label", "The book");
  // Boxes that scroll sideways can be scrolled from the keyboard.
  for (const box of document.querySelectorAll(".bd-article table.table, .bd-article div.math, .bd-article .text_html, .bd-article pre")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
  // The download button downloads, and does not open a tab full of JSON.
  for (const link of document.querySelectorAll("a.btn-download-source-button, a.btn-download-notebook-button")) {
    link.setAttribute("download", "");
    link.removeAttribute("target");
  }
});
