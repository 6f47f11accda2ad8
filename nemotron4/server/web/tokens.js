/** Token probabilities: text coloured by how unlikely each token was, and its alternatives. */

import { h } from "./dom.js";

/**
 * What the API reports about tokens, with those that share a character put together: a token may hold a part
 * of one only.
 * @param {{token: string, logprob: number, bytes: number[] | null, top_logprobs: {token: string, logprob: number}[]}[]} reported
 * @returns {import("./conversation.js").Token[]}
 */
export class TokenReader {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #pending = null;

  read(reported) {
    const tokens = [];
    for (const each of reported) {
      const text = each.bytes ? this.#decoder.decode(new Uint8Array(each.bytes), { stream: true }) : each.token;
      const top = each.top_logprobs.map(({ token, logprob }) => ({ text: token, logprob }));
      const whole = this.#pending ?? { text: "", logprob: 0, top };
      whole.logprob += each.logprob;
      whole.text += text;
      this.#pending = text === "" ? whole : null;
      if (text !== "") tokens.push(whole);
    }
    return tokens;
  }
}

/** Adds the tokens that the container does not show yet, as plain text. */
export function drawTokens(container, tokens) {
  for (let number = container.children.length; number < tokens.length; number++) {
    container.append(tokenSpan(tokens[number], tokens[number].text));
  }
}

function tokenSpan(token, text) {
  const span = h("span", { class: text.includes("\n") ? "token newline" : "token" }, text);
  span.token = token;
  // 0 for a sure token, 1 from a probability of one percent down.
  span.style.setProperty("--surprise", Math.min(1, -token.logprob / 4.6).toFixed(3));
  return span;
}

const FURTHEST = 200; // characters of markup that may lie between two characters that are shown

/**
 * Puts each character of a drawn block into an element of the token that it came from. `source` is the block's
 * Markdown, which starts at `start` of the text that the tokens spell; markup has no character on screen.
 */
export function weave(element, start, source, tokens) {
  const ends = [];
  for (const { text } of tokens) ends.push((ends.at(-1) ?? 0) + text.length);
  let at = 0; // in the source
  let number = 0; // of the token
  const tokenAt = (position) => {
    while (number < tokens.length - 1 && ends[number] <= position) number++;
    return tokens[number];
  };
  for (const node of textNodes(element)) {
    const parts = document.createDocumentFragment();
    let held = "";
    let token = null;
    for (const character of node.data) {
      const found = source.indexOf(character, at);
      const isThere = found >= 0 && found - at <= FURTHEST;
      const next = isThere ? tokenAt(start + found) : token;
      if (isThere) at = found + character.length;
      if (next !== token && held) {
        parts.append(token ? tokenSpan(token, held) : held);
        held = "";
      }
      token = next;
      held += character;
    }
    if (held) parts.append(token ? tokenSpan(token, held) : held);
    node.replaceWith(parts);
  }
}

function textNodes(element) {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT, (node) =>
    node.parentElement.closest(".math, .code-head") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  return nodes;
}

const detail = () => document.getElementById("token-detail");
let pinned = null;

/** The text of an answer as tokens that can be pointed at, clicked, or walked through with the arrow keys. */
export function tokenText() {
  const container = h("div", {
    class: "tokens",
    tabindex: "0",
    role: "group",
    "aria-label": "Answer with token probabilities; the arrow keys go through the tokens",
  });
  container.addEventListener("pointerover", (event) => {
    if (event.target.token && !pinned) show(event.target, false);
  });
  container.addEventListener("pointerleave", () => pinned || hide());
  container.addEventListener("click", (event) => {
    if (event.target.token) pinned === event.target ? unpin() : show(event.target, true);
  });
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") unpin();
    if (!step) return;
    event.preventDefault();
    const all = [...container.querySelectorAll(".token")];
    const now = all.indexOf(pinned);
    const next = all[now < 0 ? 0 : Math.max(0, Math.min(now + step, all.length - 1))];
    if (next) show(next, true);
  });
  container.addEventListener("blur", unpin);
  return container;
}

function show(span, isPinned) {
  if (isPinned) {
    pinned?.classList.remove("current");
    pinned = span;
    span.classList.add("current");
  }
  const { text, logprob, top } = span.token;
  const box = detail();
  box.replaceChildren(
    h("p", {}, h("code", {}, visible(text)), ` ${percent(logprob)} `, h("small", {}, `log-probability ${logprob.toFixed(3)}`)),
    isPinned && top.length ? alternatives(top, text) : "",
  );
  box.hidden = false;
  if (isPinned) document.getElementById("status").textContent = `${visible(text)}, ${percent(logprob)}`;
  place(box, span.getClientRects()[0] ?? span.getBoundingClientRect());
}

function alternatives(top, chosen) {
  const rows = top.map(({ text, logprob }) => {
    const bar = h("span", { class: "bar-fill" });
    bar.style.width = `${(100 * Math.exp(logprob)).toFixed(1)}%`;
    return h("li", { class: text === chosen ? "chosen" : "" }, h("code", {}, visible(text)), h("span", { class: "bar-track" }, bar), h("span", {}, percent(logprob)));
  });
  return h("ol", {}, ...rows);
}

function place(box, around) {
  const { width, height } = box.getBoundingClientRect();
  const left = Math.max(8, Math.min(around.left, innerWidth - width - 8));
  const below = around.bottom + 6;
  box.style.left = `${left}px`;
  box.style.top = `${below + height < innerHeight ? below : Math.max(8, around.top - height - 6)}px`;
}

function hide() {
  detail().hidden = true;
}

export function unpin() {
  pinned?.classList.remove("current");
  pinned = null;
  hide();
}

const visible = (text) => text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "(nothing)";

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.05 ? "< 0.1 %" : share >= 99.95 ? "100 %" : `${share.toFixed(1)} %`;
}
