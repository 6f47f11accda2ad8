/** One answer in the thread: its text, how it came about, and what can be done with it. */

import { laneName } from "./conversation.js";
import { copyText, h, iconButton, save } from "./dom.js";
import { drawMarkdown } from "./markdown.js";
import { tokenText, weave } from "./tokens.js";

/** The five attributes of a HelpSteer reward model lie between these. */
const SCORE_RANGE = [0, 4];

/** An answer as it is read aloud: what its Markdown shows, without the marks, the buttons and the second form of a formula. */
export function spoken(text) {
  const drawn = h("div");
  drawMarkdown(drawn, text);
  for (const each of drawn.querySelectorAll("[aria-hidden=true], annotation, button")) each.remove();
  for (const each of drawn.querySelectorAll("td, th, li, p, pre, h1, h2, h3, h4, h5, h6")) each.append(" ");
  return drawn.textContent.replace(/\s+/g, " ").trim();
}

/**
 * @param {{number: number, numLanes: number, onAgain: () => void, onShow: (shown: number) => void, onSnippets: () => void}} options
 */
export class AnswerView {
  #text = h("div", { class: "text" });
  #tokens = null;
  #note = h("p", { class: "note" });
  #score = h("details", { class: "score", hidden: true });
  #retry;
  #save;
  #versions = h("span", { class: "versions" });
  #waiting = null;
  #options;

  constructor(options) {
    this.#options = options;
    const { number, numLanes, onAgain, onSnippets } = options;
    this.#name = h("h3", {}, "");
    const copy = iconButton("copy", "Copy answer", () => copyText(this.#answer?.text ?? "", copy));
    this.#retry = h("button", { type: "button", class: "quiet", hidden: true, onclick: onAgain }, "Try again");
    this.#save = iconButton("save", "Save the token probabilities", () => save("tokens.json", JSON.stringify(this.#answer.tokens, null, 1)), { hidden: true });
    this.#actions = h("div", { class: "actions" },
      this.#versions,
      copy,
      iconButton("again", "Answer again", onAgain),
      iconButton("code", "Copy as curl, Python or call JSON", onSnippets),
      this.#save,
      this.#note,
      this.#retry,
    );
    this.element = h("article", { class: "answer", "aria-label": numLanes > 1 ? `Answer ${laneName(number)}` : "Answer" },
      this.#name, this.#text, this.#score, this.#actions);
  }

  #name;
  #actions;
  #answer = null;

  /** Shows an answer that may still grow; drawn at most once for each frame. */
  show(laneAnswers, { isRunning }) {
    const answer = laneAnswers.answers[laneAnswers.shown] ?? null;
    if (answer !== this.#answer) this.#clear();
    this.#answer = answer;
    if (!answer) return;
    this.#state = { laneAnswers, isRunning };
    this.#waiting ??= requestAnimationFrame(() => this.#draw());
  }

  #state = null;

  #clear() {
    this.#text.replaceChildren();
    this.#tokens = null;
    this.#score.hidden = true;
  }

  #draw() {
    this.#waiting = null;
    const answer = this.#answer;
    if (!answer) return;
    const { laneAnswers, isRunning } = this.#state;
    const { number, numLanes } = this.#options;
    this.#name.replaceChildren(...(numLanes > 1 ? [h("span", { class: "lane" }, laneName(number)), " "] : []), answer.model,
      ...(numLanes > 1 && answer.settings ? [h("span", { class: "settings" }, answer.settings)] : []));
    if (answer.tokens.length) {
      this.#tokens ??= this.#startTokens();
      drawMarkdown(this.#tokens, answer.text, (element, start, source) => weave(element, start, source, answer.tokens));
    } else {
      drawMarkdown(this.#text, answer.text);
    }
    this.element.classList.toggle("running", isRunning);
    this.element.setAttribute("aria-busy", String(isRunning));
    this.#actions.hidden = isRunning;
    this.#save.hidden = !answer.tokens.length;
    this.#retry.hidden = !answer.error && answer.finish !== "interrupted";
    this.#note.textContent = isRunning ? "" : describe(answer);
    this.#note.classList.toggle("alert", Boolean(answer.error));
    if (answer.error) this.#note.setAttribute("role", "alert");
    else this.#note.removeAttribute("role");
    this.#drawVersions(laneAnswers);
    this.#drawScore(answer.score);
  }

  #startTokens() {
    const container = tokenText();
    this.#text.replaceChildren(container);
    return container;
  }

  #drawVersions({ answers, shown }) {
    const turn = (name, label, to) => iconButton(name, label, () => this.#options.onShow(to), { disabled: to < 0 || to >= answers.length });
    this.#versions.replaceChildren(...(answers.length < 2 ? [] : [
      turn("left", "Answer before", shown - 1),
      h("span", {}, `${shown + 1} of ${answers.length}`),
      turn("right", "Next answer", shown + 1),
    ]));
  }

  #drawScore(score) {
    this.#score.hidden = !score;
    if (!score) return;
    const [least, most] = SCORE_RANGE;
    const rows = Object.entries(score.attributes).map(([name, value]) => {
      const fill = h("span", { class: "bar-fill" });
      fill.style.width = `${(100 * Math.max(0, Math.min(1, (value - least) / (most - least)))).toFixed(1)}%`;
      return h("div", {}, h("dt", {}, name), h("dd", {}, h("span", { class: "bar-track" }, fill), h("span", { class: "number" }, value.toFixed(2))));
    });
    const short = Object.entries(score.attributes).map(([name, value]) => `${name} ${value.toFixed(1)}`).join(", ");
    this.#score.replaceChildren(
      h("summary", {}, score.reward === null ? short : `Reward ${score.reward.toFixed(2)} \u00b7 ${short}`),
      h("dl", { "aria-label": "Attributes, 0 to 4" }, ...rows),
    );
  }
}

function describe({ error, finish, numTokens, seconds, scoreError }) {
  if (error) return error;
  const parts = [];
  if (numTokens !== null) parts.push(`${numTokens} tokens`);
  if (seconds > 0) parts.push(`${seconds.toFixed(1)} s`);
  if (numTokens !== null && seconds > 0) parts.push(`${(numTokens / seconds).toFixed(0)} tokens/s`);
  const endings = { length: "cut at the token limit", stopped: "stopped by you", content_filter: "withheld by the guard", interrupted: "interrupted: the page was closed" };
  if (endings[finish]) parts.push(endings[finish]);
  if (scoreError) parts.push(`no score: ${scoreError}`);
  return parts.join(" \u00b7 ");
}
