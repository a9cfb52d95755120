"use strict";
// A click on a head sorts its table by that column: numbers first by size, texts by letters.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    const number = Number(text);
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const order = (a, b) => typeof a === typeof b
    ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  const sort = column => {
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows];
    rows.sort((one, two) => order(value(one, column), value(two, column)) * (down ? -1 : 1));
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.title = "sort by this column";
    head.addEventListener("click", () => sort(column));
    head.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(column); }
    });
  });
}
// What is wider or longer than its frame says so, and can be scrolled by the keyboard.
const frames = [...document.querySelectorAll(".scroll")];
const look = () => frames.forEach(frame => {
  const wide = frame.scrollWidth > frame.clientWidth + 1;
  frame.classList.toggle("wider", wide);
  frame.classList.remove("longer");
  frame.classList.toggle("longer", frame.scrollHeight > frame.clientHeight + 1);
  if (wide) frame.tabIndex = 0; else frame.removeAttribute("tabindex");
});
look();
addEventListener("resize", look);
