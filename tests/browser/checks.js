// Evaluated in the page; returns what is wrong with its layout, one line each.
() => {
  const problems = [];
  const name = (e) => `${e.tagName.toLowerCase()} "${e.textContent.trim().slice(0, 40)}"`;
  const seen = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 0 && !e.closest(".hidden");
  const overlap = (a, b, slack) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > slack &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > slack;

  const width = document.scrollingElement.scrollWidth;
  if (width > innerWidth) problems.push(`the page is wider than the window: ${width} of ${innerWidth} pixels`);

  // relative luminance and contrast as WCAG 2.2 defines them
  const rgb = (color) => color.match(/[\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = rgb(color).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (rgb(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (e, color, least) => {
    const [dark, light] = [luminance(color), luminance(background(e))].sort((a, b) => a - b);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < least) problems.push(`${name(e)} has a contrast of ${ratio.toFixed(1)}, less than ${least}`);
  };

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const written = new Set();
  while (walker.nextNode()) if (walker.currentNode.data.trim()) written.add(walker.currentNode.parentElement);
  for (const e of written) {
    if (!seen(e) || e.closest("title, desc")) continue;
    const style = getComputedStyle(e);
    contrast(e, e.closest("svg") ? style.fill : style.color, 4.5);
    const scale = e.closest("svg") ? e.getScreenCTM().a : 1;
    if (parseFloat(style.fontSize) * scale < 10.5) problems.push(`${name(e)} is small`);
  }
  for (const mark of document.querySelectorAll("svg .mark, svg .bar, svg .dot"))
    if (seen(mark)) contrast(mark, getComputedStyle(mark)[mark.matches(".mark") ? "stroke" : "fill"], 3);

  for (const svg of document.querySelectorAll("svg:not(.swatch)")) {
    if (!seen(svg)) continue;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((e) => [e, e.getBoundingClientRect()]);
    const marks = [...svg.querySelectorAll(".mark")].map((e) => e.getBoundingClientRect());
    texts.forEach(([e, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 3 || box.bottom > frame.bottom + 3)
        problems.push(`${name(e)} is cut off by its chart`);
      for (const [other, its] of texts.slice(i + 1))
        if (overlap(box, its, 1)) problems.push(`${name(e)} overlaps ${name(other)}`);
      if (marks.some((mark) => overlap(box, mark, 2))) problems.push(`${name(e)} is covered by a mark`);
    });
  }

  const plots = [...document.querySelectorAll(".plot svg:not(.swatch)")];
  if (plots.length && plots.filter(seen).length === 0) problems.push("no plot is to be seen");
  if (plots.filter(seen).length > 1) problems.push("both plots are to be seen");

  for (const table of document.querySelectorAll("table"))
    for (const cell of table.querySelectorAll(".number"))
      if (getComputedStyle(cell).textAlign !== "right") problems.push(`${name(cell)} is not right-aligned`);
  return problems;
};
