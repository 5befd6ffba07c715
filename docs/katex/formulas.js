// Draws the formulas of each page with KaTeX, also after a page was opened without a full load.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim(); // \( ... \) in a line, \[ ... \] on lines of its own
    katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
});
