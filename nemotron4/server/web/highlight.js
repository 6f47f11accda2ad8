/** Colours for code: highlight.js finds the parts, which become elements here. */

import { h } from "./dom.js";

const LONGEST = 20_000; // characters; a longer text is shown plain

let loading = null;

/** Colours a code element once the library is there; until then its text stands plain. */
export async function drawHighlighted(element, source, language) {
  if (!language || source.length > LONGEST) return;
  loading ??= import("./vendor/highlight.min.js");
  const { default: highlighter } = await loading;
  if (!highlighter.getLanguage(language)) return;
  const { _emitter: found } = highlighter.highlight(source, { language, ignoreIllegals: true });
  element.replaceChildren(...found.rootNode.children.map(drawn));
}

function drawn(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const scope = (node.scope ?? "").split(".")[0];
  return h("span", scope ? { class: `hl-${scope}` } : {}, ...node.children.map(drawn));
}
