/** Formulas: where they stand in a Markdown text, and their drawing by KaTeX, which is loaded for the first one. */

import { h } from "./dom.js";

/** Adds `$x$`, `$$x$$`, `\(x\)` and `\[x\]` to a Markdown reader. */
export function mathRules(reader) {
  reader.inline.ruler.before("escape", "math_inline", inlineMath);
  reader.block.ruler.before("fence", "math_block", blockMath, { alt: ["paragraph", "reference", "blockquote", "list"] });
}

function inlineMath(state, isSilent) {
  const text = state.src.slice(state.pos, state.posMax);
  // A dollar before a digit that ends another sum of money opens nothing: no space inside, no digit behind.
  const found = /^\\\((.+?)\\\)/s.exec(text) ?? /^\$\$(.+?)\$\$/s.exec(text) ?? /^\$(?![\s$])((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d)/.exec(text);
  if (!found) return false;
  if (!isSilent) state.push("math_inline", "", 0).content = found[1].trim();
  state.pos += found[0].length;
  return true;
}

function blockMath(state, startLine, endLine, isSilent) {
  const first = state.src.slice(state.bMarks[startLine] + state.tShift[startLine], state.eMarks[startLine]);
  const mark = /^(\$\$|\\\[)/.exec(first)?.[0];
  if (!mark) return false;
  const close = mark === "$$" ? "$$" : "\\]";
  const lines = [first.slice(2)];
  let line = startLine;
  while (!lines.at(-1).includes(close)) {
    if (++line >= endLine) return false;
    lines.push(state.src.slice(state.bMarks[line], state.eMarks[line]));
  }
  const [inside, behind] = lines.join("\n").split(close);
  if (behind.trim()) return false;
  if (isSilent) return true;
  const token = state.push("math_block", "", 0);
  token.content = inside.trim();
  token.map = [startLine, line + 1];
  state.line = line + 1;
  return true;
}

let loading = null;

async function load() {
  document.head.append(h("link", { rel: "stylesheet", href: "web/vendor/katex.min.css" }));
  await import("./vendor/katex.min.js");
  return globalThis.katex;
}

/** An element with the formula; its source shows until the library is there, and stays where it is no formula. */
export function drawMath(source, isBlock) {
  const element = h(isBlock ? "div" : "span", { class: isBlock ? "math block-math" : "math" }, source);
  loading ??= load();
  loading.then((katex) => {
    try {
      katex.render(source, element, { displayMode: isBlock, throwOnError: true, trust: false, maxExpand: 200 });
    } catch {
      element.textContent = source; // half of a stream, or not TeX
    }
  }, () => {});
  return element;
}
