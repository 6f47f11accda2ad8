/**
 * Markdown as elements. markdown-it reads it; its tokens become elements here, so no HTML is ever parsed and what a
 * model writes cannot become markup. Images are not loaded: their text and address are shown.
 */

import MarkdownIt from "./vendor/markdown-it.esm.min.mjs";
import { copyText, h, iconButton } from "./dom.js";
import { drawHighlighted } from "./highlight.js";
import { drawMath, mathRules } from "./math.js";

const reader = new MarkdownIt({ html: false, linkify: true, breaks: true }).use(mathRules);

/** @typedef {{source: string, start: number, tokens: object[]}} Block */

/**
 * Draws the text into the container. Blocks that have not changed keep their elements, so that a stream redraws
 * its last block alone. `onDrawn(element, start, source)` is called for each block that was drawn; code then has no
 * colours, which would come later and replace what the caller put there.
 */
export function drawMarkdown(container, text, onDrawn = null) {
  const blocks = split(text);
  blocks.forEach(({ source, start, tokens }, number) => {
    const old = container.children[number];
    if (old?.drawnFrom === source) return;
    const element = h("div", { class: "block" });
    drawTokens(element, tokens, { hasColours: !onDrawn });
    element.drawnFrom = source;
    if (old) old.replaceWith(element);
    else container.append(element);
    onDrawn?.(element, start, source);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

/** The top-level blocks of a text, each with the part of the text that it comes from. */
export function split(text) {
  const blocks = [];
  const lines = lineStarts(text);
  let held = [];
  for (const token of reader.parse(text, {})) {
    held.push(token);
    if (token.level !== 0 || token.nesting > 0) continue;
    const [first, end] = held[0].map ?? [0, 0];
    const start = lines[first] ?? text.length;
    blocks.push({ start, source: text.slice(start, lines[end] ?? text.length), tokens: held });
    held = [];
  }
  return blocks;
}

function lineStarts(text) {
  const starts = [0];
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
  return starts;
}

const TAGS = new Set(["p", "ul", "ol", "li", "blockquote", "strong", "em", "s", "table", "thead", "tbody", "tr", "th", "td"]);

/** Appends what a list of tokens says, nested as their opening and closing ones say. */
function drawTokens(root, tokens, options) {
  const open = [root];
  for (const token of tokens) {
    const parent = open.at(-1);
    if (token.nesting < 0) open.pop();
    else if (token.nesting > 0) {
      const element = opened(token);
      // A table scrolls by itself where the window is narrow.
      parent.append(token.tag === "table" ? h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, element) : token.hidden ? "" : element);
      open.push(token.hidden ? parent : element);
    } else if (token.type === "inline") drawInline(parent, token.children);
    else parent.append(drawn(token, options));
  }
}

function opened(token) {
  if (token.type === "heading_open") return h(`h${Math.min(Number(token.tag[1]) + 3, 6)}`); // under the page's own
  if (token.type === "link_open") return link(token.attrGet("href"));
  if (!TAGS.has(token.tag)) return h("span");
  const start = token.attrGet("start");
  const align = /(left|center|right)/.exec(token.attrGet("style") ?? "")?.[1];
  return h(token.tag, { ...(start && { start }), ...(align && { class: `to-${align}` }) });
}

function drawn(token, { hasColours }) {
  if (token.type === "fence" || token.type === "code_block") return drawCode(token.content.replace(/\n$/, ""), token.info.trim().split(/\s+/)[0], hasColours);
  if (token.type === "math_block") return drawMath(token.content, true);
  if (token.type === "hr") return h("hr");
  return document.createTextNode(token.content);
}

function drawInline(parent, tokens) {
  const box = parent.tagName === "P" && parent.parentElement?.tagName === "LI" ? parent.parentElement : parent;
  const task = box.tagName === "LI" && /^\[([ xX])\] /.exec(tokens[0]?.type === "text" ? tokens[0].content : "");
  if (task) {
    box.classList.add("task");
    parent.append(h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "open" : "done" }), " ");
    tokens = [Object.assign(Object.create(tokens[0]), { content: tokens[0].content.slice(4) }), ...tokens.slice(1)];
  }
  const open = [parent];
  for (const token of tokens) {
    if (token.nesting < 0) open.pop();
    else if (token.nesting > 0) open.push(appended(open.at(-1), opened(token)));
    else open.at(-1).append(inline(token));
  }
}

function appended(parent, element) {
  parent.append(element);
  return element;
}

function inline(token) {
  if (token.type === "code_inline") return h("code", {}, token.content);
  if (token.type === "math_inline") return drawMath(token.content, false);
  if (token.type === "softbreak" || token.type === "hardbreak") return h("br");
  if (token.type === "image") return link(token.attrGet("src"), `[image: ${token.content || "no description"}]`);
  return document.createTextNode(token.content);
}

/** A link that leads out of the page and takes nothing along; other addresses than the web's stay text. */
function link(address, text = "") {
  if (!/^(https?:|mailto:)/i.test(address ?? "")) return h("span", { class: "no-link", title: address }, text);
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, text);
}

function drawCode(source, language, hasColours) {
  const label = language ? `Code, ${language}` : "Code";
  const copy = iconButton("copy", "Copy code", () => copyText(source, copy));
  const head = h("div", { class: "code-head" }, h("span", {}, language || "code"), copy);
  const code = h("code", {}, source);
  if (hasColours) drawHighlighted(code, source, language);
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0", role: "region", "aria-label": label }, code));
}
