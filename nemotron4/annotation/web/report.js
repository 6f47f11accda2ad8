/** A report's blocks (`nemotron4/report.py`, as JSON) as elements. */

import { h } from "./element.js";

export const drawReport = (blocks) => blocks.map(draw);

function draw(block) {
  switch (block.kind) {
    case "heading": return h(`h${Math.min(4, block.level + 1)}`, {}, block.text);
    case "text": return h("p", { class: block.is_verdict ? "verdict" : "" }, block.text);
    case "table": return table(block);
    case "bars": return table({ title: `${block.title}, ${block.unit}`, columns: ["", block.unit], rows: block.bars.map((bar) => [bar.name, bar.label]) });
    case "folded": return h("details", {}, h("summary", {}, block.summary), ...block.texts.map(([name, text]) => h("pre", {}, `${name}\n${text}`)));
    default: return "";
  }
}

const isNumber = (cell) => /^[-+<±]?\d/.test(cell) || ["", "-", "unscored"].includes(cell);

function table({ title, columns, rows }) {
  const kinds = columns.map((_, at) => (rows.length && rows.every((row) => isNumber(row[at])) ? "number" : ""));
  const cells = (row, tag) => h("tr", {}, ...row.map((cell, at) => h(tag, { class: kinds[at] }, cell)));
  // Where a narrow window cuts the table, the keyboard must be able to scroll it.
  return h("div", { class: "wide", role: "region", tabindex: 0, "aria-label": title || `table: ${columns.slice(0, 3).join(", ")}` }, h("table", {}, title ? h("caption", {}, title) : "", h("thead", {}, cells(columns, "th")), h("tbody", {}, ...rows.map((row) => cells(row, "td")))));
}
