// Tables sort on a click, the contents follow, and what is folded is printed.
"use strict";

/** What a cell sorts by: its first number, or its text. */
function sortKey(cell) {
  const text = cell.textContent.trim();
  const number = text.replaceAll(",", "").match(/^[^\d+-]{0,2}([+-]?\d*\.?\d+(e[+-]?\d+)?)/);
  return number ? Number(number[1]) : text.toLowerCase();
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1; // numbers first
}

function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const column = heading.cellIndex;
  const rows = [...body.rows].map((row) => [sortKey(row.cells[column]), row]);
  rows.sort(([a], [b]) => direction * compare(a, b));
  body.append(...rows.map(([, row]) => row));
}

for (const heading of document.querySelectorAll("thead th")) {
  if (heading.closest("table").tBodies[0].rows.length < 3) continue;
  heading.tabIndex = 0;
  heading.title = "Sort by this column";
  heading.addEventListener("click", () => sortBy(heading));
  heading.addEventListener("keydown", (event) => event.key === "Enter" && sortBy(heading));
}

const contents = document.querySelector("nav details");
if (contents && !matchMedia("(min-width: 75rem)").matches) contents.open = false;
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [decodeURIComponent(a.hash.slice(1)), a]));
const follow = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "0px 0px -75% 0px" });
for (const heading of document.querySelectorAll("h2")) follow.observe(heading);

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("main details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
});
