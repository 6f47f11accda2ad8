/** The chat: one conversation on screen, and the answers that are on their way. */

import { events, request, sendJson } from "./api.js";
import { AnswerView, spoken } from "./answer.js";
import { branch, chatBody, isWhole, messagesFor, newAnswer, newTurn, showVersion, shownAnswer, turnAgain } from "./conversation.js";
import { announce, copyText, growing, h, iconButton } from "./dom.js";
import { TokenReader, unpin } from "./tokens.js";

const NUM_ALTERNATIVES = 5;
const NEAR_END = 80; // pixels from the end at which a growing answer still pulls the view along
const SAVE_EVERY_MS = 1000; // while an answer streams

export class Chat {
  conversation = null;
  #info;
  #fields;
  #preferences;
  #onChange;
  #onSnippets;
  #thread = document.getElementById("thread");
  #toEnd = document.getElementById("to-end");
  #views = []; // of each turn, of each lane
  #running = new Map(); // conversation -> AbortController

  /** @param {{onChange: (conversation) => void, onSnippets: (body) => void}} options */
  constructor(info, fields, preferences, { onChange, onSnippets }) {
    this.#info = info;
    this.#fields = fields;
    this.#preferences = preferences;
    this.#onChange = onChange;
    this.#onSnippets = onSnippets;
    this.#thread.addEventListener("scroll", () => this.#showToEnd(), { passive: true });
    this.#toEnd.addEventListener("click", () => { this.#thread.scrollTop = this.#thread.scrollHeight; });
  }

  #showToEnd() {
    this.#toEnd.hidden = this.#fromEnd() < 4 * NEAR_END;
  }

  #fromEnd() {
    return this.#thread.scrollHeight - this.#thread.scrollTop - this.#thread.clientHeight;
  }

  get isRunning() {
    return this.#running.has(this.conversation);
  }

  open(conversation) {
    this.conversation = conversation;
    this.redraw();
    this.#thread.scrollTop = this.#thread.scrollHeight;
  }

  redraw() {
    unpin();
    this.#views = [];
    this.#thread.replaceChildren();
    this.#thread.classList.toggle("side-by-side", this.conversation.lanes.length > 1);
    if (!this.conversation.turns.length) this.#thread.append(this.#welcome());
    this.conversation.turns.forEach((_, number) => this.#append(number));
    this.#showButtons();
  }

  async send(text) {
    if (this.isRunning || !text.trim()) return;
    const { conversation } = this;
    conversation.turns.push(newTurn(text, conversation.lanes.length));
    this.#thread.querySelector(".welcome")?.remove();
    const number = conversation.turns.length - 1;
    this.#append(number);
    this.#onChange(conversation);
    this.#thread.scrollTop = this.#thread.scrollHeight;
    await this.#answer(conversation, number, conversation.lanes.map((_, lane) => lane));
  }

  stop() {
    this.#running.get(this.conversation)?.abort();
  }

  /** Another answer to a turn in one lane; what followed the turn stays, as another version of it. */
  async again(number, lane) {
    if (this.isRunning) return;
    const { conversation } = this;
    if (number < conversation.turns.length - 1) {
      branch(conversation, number, turnAgain(conversation.turns[number]));
      this.redraw();
    }
    await this.#answer(conversation, number, [lane]);
  }

  /** The turn asks something else now; the turn as it was and what followed it stay, as another version. */
  async edit(number, text) {
    if (this.isRunning || !text.trim()) return;
    const { conversation } = this;
    branch(conversation, number, newTurn(text, conversation.lanes.length));
    this.redraw();
    await this.#answer(conversation, number, conversation.lanes.map((_, lane) => lane));
  }

  /** Opens the editor of the last message; false when there is none. */
  editLast() {
    const button = [...this.#thread.querySelectorAll("[aria-label='Edit message']")].at(-1);
    button?.click();
    return Boolean(button);
  }

  async #answer(conversation, number, lanes) {
    const controller = new AbortController();
    this.#running.set(conversation, controller);
    this.#showButtons();
    announce("The model answers");
    await Promise.all(lanes.map((lane) => this.#answerLane(conversation, number, lane, controller.signal)));
    this.#running.delete(conversation);
    this.#showButtons();
    for (const lane of lanes) this.#show(conversation, number, lane);
    conversation.updated = Date.now();
    this.#onChange(conversation);
    const answers = lanes.map((lane) => shownAnswer(conversation.turns[number], lane));
    announce(answers.map(({ error, text }) => error ?? `Answer: ${spoken(text).slice(0, 400)}`).join(" "));
    await Promise.all(lanes.map((lane) => this.#score(conversation, number, lane)));
  }

  async #answerLane(conversation, number, laneNumber, signal) {
    const lane = conversation.lanes[laneNumber];
    const body = chatBody(conversation, number, laneNumber, this.#fields);
    const answer = newAnswer(lane);
    const answers = conversation.turns[number].lanes[laneNumber];
    answers.answers.push(answer);
    answers.shown = answers.answers.length - 1;
    this.#show(conversation, number, laneNumber);
    Object.assign(body, { stream: true, stream_options: { include_usage: true } });
    if (this.#preferences.get("probabilities")) Object.assign(body, { logprobs: true, top_logprobs: NUM_ALTERNATIVES });
    const started = performance.now();
    let saved = started;
    const reader = new TokenReader();
    try {
      const path = lane.isOther ? "page/compare" : "v1/chat/completions";
      const response = await request(path, { method: "POST", body, signal });
      for await (const event of events(response)) {
        const choice = event.choices[0];
        answer.text += choice?.delta.content ?? "";
        if (choice?.logprobs?.content) answer.tokens.push(...reader.read(choice.logprobs.content));
        answer.finish = choice?.finish_reason ?? answer.finish;
        answer.numTokens = event.usage?.completion_tokens ?? answer.numTokens;
        this.#show(conversation, number, laneNumber);
        if (performance.now() - saved > SAVE_EVERY_MS) {
          saved = performance.now();
          answer.seconds = (saved - started) / 1000;
          this.#onChange(conversation);
        }
      }
      if (!answer.text.trim() && answer.finish !== "content_filter") answer.error = "The model answered with nothing.";
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else answer.error = error.message;
    }
    answer.seconds = (performance.now() - started) / 1000;
  }

  async #score(conversation, number, lane) {
    const answer = shownAnswer(conversation.turns[number], lane);
    if (!this.#info.has_reward || !isWhole(answer)) return;
    try {
      const { attributes, reward = null } = await sendJson("score", { messages: messagesFor(conversation, number, lane, { withAnswer: true }) });
      answer.score = { attributes, reward };
    } catch (error) {
      answer.scoreError = error.message;
    }
    this.#show(conversation, number, lane);
    this.#onChange(conversation);
  }

  #show(conversation, number, lane) {
    if (conversation !== this.conversation) return;
    const isAtEnd = this.#fromEnd() < NEAR_END;
    const answer = shownAnswer(conversation.turns[number], lane);
    const isRunning = this.isRunning && answer?.finish === null && !answer.error;
    this.#views[number]?.[lane]?.show(conversation.turns[number].lanes[lane], { isRunning });
    requestAnimationFrame(() => {
      if (isAtEnd) this.#thread.scrollTop = this.#thread.scrollHeight;
      this.#showToEnd();
    });
  }

  #append(number) {
    const { conversation } = this;
    const turn = conversation.turns[number];
    const views = turn.lanes.map((_, lane) => new AnswerView({
      number: lane,
      numLanes: turn.lanes.length,
      onAgain: () => this.again(number, lane),
      onShow: (shown) => {
        if (this.isRunning) return;
        turn.lanes[lane].shown = shown;
        this.#show(conversation, number, lane);
        this.#onChange(conversation);
      },
      onSnippets: () => this.#onSnippets(chatBody(conversation, number, lane, this.#fields)),
    }));
    this.#views[number] = views;
    this.#thread.append(h("div", { class: "turn" }, this.#userTurn(number), h("div", { class: "lanes" }, ...views.map((view) => view.element))));
    views.forEach((_, lane) => this.#show(conversation, number, lane));
  }

  #userTurn(number) {
    const { user: text, fork } = this.conversation.turns[number];
    const said = h("div", { class: "text" }, text);
    const copy = iconButton("copy", "Copy message", () => copyText(text, copy));
    const edit = iconButton("edit", "Edit message", () => {
      const area = h("textarea", { "aria-label": "Edit message", rows: 2 });
      area.value = text;
      const back = () => {
        form.replaceWith(element);
        edit.focus();
      };
      const form = h("form", { class: "user editing", onsubmit: (event) => {
        event.preventDefault();
        this.edit(number, area.value);
      } }, area, h("div", { class: "row end" },
        h("button", { type: "button", class: "quiet", onclick: back }, "Cancel"),
        h("button", { type: "submit", class: "primary" }, "Send again")));
      form.addEventListener("keydown", (event) => event.key === "Escape" && back());
      const fit = growing(area);
      element.replaceWith(form);
      fit();
      area.focus();
    });
    const element = h("article", { class: "user", "aria-label": "You" }, h("h2", { class: "unseen" }, "You"), said, h("div", { class: "actions" }, this.#versions(number, fork), copy, edit));
    return element;
  }

  #versions(number, fork) {
    if (!fork) return "";
    const turn = (name, label, to) => iconButton(name, label, () => {
      if (this.isRunning) return;
      showVersion(this.conversation, number, to);
      this.redraw();
      this.#onChange(this.conversation);
    }, { disabled: to < 0 || to >= fork.paths.length });
    return h("span", { class: "versions" },
      turn("left", "Version before", fork.shown - 1), h("span", {}, `${fork.shown + 1} of ${fork.paths.length}`), turn("right", "Next version", fork.shown + 1));
  }

  #welcome() {
    const { model, has_chat, is_reward_model, context_length, checkpoint } = this.#info;
    if (is_reward_model) {
      return h("div", { class: "welcome" }, h("h2", {}, model),
        h("p", {}, "This is a reward model: it judges answers and writes none. Start a chat model with --reward-model and this server's address, and its answers come with scores."));
    }
    if (!has_chat) {
      return h("div", { class: "welcome" }, h("h2", {}, model), h("p", {}, "This model has no chat template. Continue a text under Raw prompt."));
    }
    const ideas = [this.#info.card.question, "Explain in three sentences how a transformer predicts the next token.", "Give me five ideas for a dinner without an oven."];
    return h("div", { class: "welcome" },
      h("h2", {}, model),
      h("p", {}, `Runs on the server that sent you this page, with a context of ${context_length.toLocaleString("en")} tokens.`),
      checkpoint && h("p", { class: "checkpoint" }, checkpoint),
      h("ul", {}, ...ideas.map((idea) => h("li", {}, h("button", { type: "button", class: "idea", onclick: () => this.send(idea) }, idea)))));
  }

  #showButtons() {
    document.getElementById("send").hidden = this.isRunning;
    document.getElementById("stop").hidden = !this.isRunning;
  }
}
