/**
 * The part of Markdown that models write, as elements. Links and images stay text: a page that shows what a
 * model wrote must neither load nor lead anywhere.
 */

import { copyText, h, iconButton } from "./dom.js";

/** @typedef {{kind: "code" | "list" | "heading" | "rule" | "quote" | "text", source: string, language?: string, level?: number}} Block */

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

/**
 * Draws the text into the container. Blocks that have not changed keep their elements, so that a stream redraws
 * its last block alone.
 */
export function drawMarkdown(container, text) {
  const blocks = split(text);
  blocks.forEach((block, number) => {
    const key = `${block.kind} ${block.language ?? block.level ?? ""} ${block.source}`;
    const old = container.children[number];
    if (old?.drawnFrom === key) return;
    const element = draw(block);
    element.drawnFrom = key;
    if (old) old.replaceWith(element);
    else container.append(element);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

/** @returns {Block[]} */
export function split(text) {
  const blocks = [];
  const lines = text.split("\n");
  let kind = null;
  let held = [];
  const flush = () => {
    if (held.length) blocks.push({ kind, source: held.join("\n") });
    held = [];
  };
  for (let number = 0; number < lines.length; number++) {
    const line = lines[number];
    const fence = FENCE.exec(line);
    if (fence) {
      flush();
      const body = [];
      while (++number < lines.length && lines[number].trim() !== fence[1]) body.push(lines[number]);
      blocks.push({ kind: "code", source: body.join("\n"), language: fence[2] });
      continue;
    }
    const heading = /^(#{1,6})\s+(.+)$/.exec(line);
    if (heading || /^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      flush();
      blocks.push(heading ? { kind: "heading", level: heading[1].length, source: heading[2] } : { kind: "rule", source: "" });
      continue;
    }
    const wanted = line.trim() === "" ? null : ITEM.test(line) ? "list" : line.startsWith(">") ? "quote" : kind === "list" && /^\s{2,}/.test(line) ? "list" : "text";
    if (wanted === null && kind === "list" && ITEM.test(lines[number + 1] ?? "")) continue; // a loose list
    if (wanted !== kind) flush();
    kind = wanted;
    if (wanted !== null) held.push(line);
  }
  flush();
  return blocks;
}

/** @param {Block} block */
function draw(block) {
  if (block.kind === "code") return drawCode(block);
  if (block.kind === "list") return drawList(block.source.split("\n"));
  if (block.kind === "rule") return h("hr");
  if (block.kind === "quote") return h("blockquote", {}, ...inline(block.source.replace(/^>\s?/gm, "")));
  // An answer stands under the page's and the turn's own headings.
  if (block.kind === "heading") return h(`h${Math.min(block.level + 3, 6)}`, {}, ...inline(block.source));
  return h("p", {}, ...inline(block.source));
}

function drawCode({ source, language }) {
  const label = language ? `Code, ${language}` : "Code";
  const copy = iconButton("copy", "Copy code", () => copyText(source, copy));
  const head = h("div", { class: "code-head" }, h("span", {}, language || "code"), copy);
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0", role: "region", "aria-label": label }, h("code", {}, source)));
}

function drawList(lines) {
  const first = ITEM.exec(lines[0]);
  const isOrdered = /\d/.test(first[2]);
  const list = h(isOrdered ? "ol" : "ul", isOrdered && first[2].slice(0, -1) !== "1" ? { start: first[2].slice(0, -1) } : {});
  const indent = first[1].length;
  for (let number = 0; number < lines.length; ) {
    const item = ITEM.exec(lines[number]);
    const rest = [];
    const inner = [];
    number++;
    while (number < lines.length) {
      const next = ITEM.exec(lines[number]);
      if (next && next[1].length <= indent + 1) break;
      if (next || inner.length) inner.push(lines[number]);
      else rest.push(lines[number].trim());
      number++;
    }
    list.append(h("li", {}, ...inline([item[3], ...rest].join("\n")), inner.length ? drawList(inner) : null));
  }
  return list;
}

const MARKS = [
  [/^`([^`\n]+)`/, (text) => h("code", {}, text)],
  [/^\*\*(?=\S)(.+?\S)\*\*|^__(?=\S)(.+?\S)__/s, (text) => h("strong", {}, ...inline(text))],
  [/^\*(?=\S)([^*\n]*?\S)\*/, (text) => h("em", {}, ...inline(text))],
];

/** Text with code, bold and italics in it. */
function inline(text) {
  const parts = [];
  let plain = "";
  for (let rest = text; rest; ) {
    const next = /[`*_]/.exec(rest)?.index ?? rest.length;
    if (next > 0) {
      plain += rest.slice(0, next);
      rest = rest.slice(next);
      continue;
    }
    const isInWord = rest[0] === "_" && /\w$/.test(plain);
    const [match, make] = (!isInWord && find(rest)) || [];
    if (match) {
      parts.push(plain, make(match.slice(1).find((group) => group !== undefined)));
      plain = "";
      rest = rest.slice(match[0].length);
    } else {
      plain += rest[0];
      rest = rest.slice(1);
    }
  }
  return [...parts, plain].filter((part) => part !== "");
}

function find(rest) {
  for (const [pattern, make] of MARKS) {
    const match = pattern.exec(rest);
    if (match) return [match, make];
  }
  return null;
}
