/**
 * The page of judgments: a list with search and filters, one item with its questions, figures and export.
 * It works over the routes of `annotation/app.py`, alone or inside another page.
 */

import { optionsOf, others, questionFor, texts } from "./questions.js";
import { drawReport } from "./report.js";
import { h } from "./element.js";

const HANDLE = "nemotron4.annotator";
const BLIND = "nemotron4.hide-scores";
const POLL_MS = 5000;
const EXPORTS = { judgments: "Judgments", preference: "Preference pairs", reward: "Ratings for a reward model" };

/** @param {(path: string, body?: object) => Promise<object>} ask the routes of one study */
export function mount(root, ask, extras = {}) {
  return new Judgments(root, ask, extras);
}

class Judgments {
  #study = null;
  #rows = [];
  #after = null;
  #item = null; // what is shown, with everybody's judgments
  #pointer = 0; // the field that a digit answers
  #editing = false;
  #lastChange = -1;
  #pending = Promise.resolve();
  #isPressed = false;
  #isStale = false;
  #unsaved = new Map(); // values for which the server was away, by person, item and answer

  constructor(root, ask, { before = null, forms = EXPORTS } = {}) {
    this.root = root;
    this.ask = ask;
    this.forms = forms;
    this.#draw(before);
    document.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", () => { this.#isPressed = true; });
    for (const end of ["pointerup", "pointercancel"]) {
      document.addEventListener(end, () => setTimeout(() => {
        this.#isPressed = false;
        if (this.#isStale) this.#drawItem();
      }));
    }
    this.at.sheet.addEventListener("focusout", () => setTimeout(() => this.#isStale && this.#drawItem()));
  }

  // ---- the frame

  #draw(before) {
    const search = h("input", { type: "search", class: "search", placeholder: "Search", "aria-label": "Search" });
    let waiting;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.#guarded(() => this.#load()), 250);
    });
    const reload = () => this.#guarded(() => this.#load());
    this.at = {
      search,
      group: h("select", { class: "group", "aria-label": "Group", onchange: reload }),
      state: h("select", { class: "state", "aria-label": "Show", onchange: reload }),
      annotator: h("input", { class: "annotator", id: "annotator", autocomplete: "off", placeholder: "your name", "aria-label": "Your name", value: localStorage.getItem(HANDLE) ?? "" }),
      blind: h("input", { type: "checkbox", id: "hide-scores" }),
      progress: h("p", { class: "progress" }),
      bar: h("progress", { max: 1, value: 0, "aria-label": "Judged" }),
      list: h("ul", { class: "items", "aria-label": "Items" }),
      empty: h("p", { class: "muted", hidden: true }),
      more: h("button", { type: "button", hidden: true, onclick: () => this.#guarded(() => this.#load({ more: true })) }, "More"),
      sheet: h("article", { class: "item", tabindex: "-1" }),
      problem: h("p", { class: "problem", role: "alert", hidden: true }),
      status: h("p", { class: "unseen", role: "status" }),
    };
    this.at.annotator.addEventListener("change", () => {
      localStorage.setItem(HANDLE, this.annotator);
      this.#guarded(async () => {
        await this.#load();
        if (this.#item) await this.open(this.#item.id);
      });
    });
    this.at.blind.checked = localStorage.getItem(BLIND) === "true";
    this.at.blind.addEventListener("change", () => {
      localStorage.setItem(BLIND, this.at.blind.checked);
      this.#drawItem();
    });
    this.exports = h("select", { class: "export", "aria-label": "Export", onchange: (event) => this.#guarded(() => this.#export(event.target)) },
      h("option", { value: "" }, "Export…"), ...Object.entries(this.forms).map(([form, title]) => h("option", { value: form }, title)));
    this.root.classList.add("judgments");
    this.root.append(
      h("div", { class: "side" }, before,
        h("div", { class: "tools" }, h("label", {}, "Name ", this.at.annotator), this.at.search, this.at.group, this.at.state,
          h("button", { type: "button", class: "report", onclick: () => this.#guarded(() => this.#report()) }, "Report"), this.exports,
          h("label", { class: "blind" }, this.at.blind, "Hide scores until I choose")),
        this.at.bar, this.at.progress, this.at.list, this.at.empty, this.at.more),
      this.at.sheet, this.at.problem, this.at.status);
  }

  get annotator() {
    return this.at.annotator.value.trim();
  }

  /** Load the study and the list; the address may name an item. */
  async start() {
    await this.#guarded(async () => {
      this.#study = await this.ask("study");
      const { groups, states, is_blind: isBlind } = this.#study;
      const count = groups.reduce((sum, each) => sum + each.items, 0);
      this.at.group.replaceChildren(h("option", { value: "" }, `all (${count})`), ...groups.map(({ name, items }) => h("option", { value: name }, `${words(name)} (${items})`)));
      if (this.#study.kind.startsWith("review") && groups[0]) this.at.group.value = groups[0].name;
      this.at.state.replaceChildren(...states.map(({ name, title }) => h("option", { value: name }, title)));
      this.exports.hidden = isBlind;
      this.at.blind.parentElement.hidden = !this.#study.kind.startsWith("review");
      this.#drawProgress(this.#study);
      await this.#load();
      const linked = decodeURIComponent(location.hash.slice(1));
      if (this.#rows.some((row) => row.id === linked) || /^[0-9a-f]{12,}$/.test(linked)) await this.open(linked);
      else if (!this.#item) this.#welcome();
      this.timer ??= setInterval(() => this.#poll(), POLL_MS);
    });
    return this.#study;
  }

  async #guarded(work) {
    try {
      await work();
      this.at.problem.hidden = true;
    } catch (error) {
      this.at.problem.textContent = error.message;
      this.at.problem.hidden = false;
    }
  }

  #welcome() {
    const keys = [["j k", "next and previous"], ["letters", "answer the main question"], ["digits", "answer the marked one"], ["n p", "mark another"], ["e", "rewrite an answer"], ["/", "search"]];
    this.at.sheet.replaceChildren(h("h2", {}, this.#study.title),
      h("p", { class: "muted" }, "Write your name, then choose an item. Everything is saved as you choose it."),
      h("dl", {}, ...keys.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])));
  }

  // ---- the list

  async #load({ more = false } = {}) {
    const query = new URLSearchParams({ group: this.at.group.value, state: this.at.state.value || "all", search: this.at.search.value, annotator: this.annotator, after: more ? this.#after ?? "" : "" });
    const page = await this.ask(`items?${query}`);
    this.#rows = more ? [...this.#rows, ...page.rows] : page.rows;
    this.#after = page.after;
    this.at.more.hidden = !page.after;
    this.at.empty.hidden = this.#rows.length > 0;
    this.at.empty.textContent = page.after ? `Nothing found in ${page.num_scanned.toLocaleString()} items yet.` : "No item fits.";
    this.#drawList();
  }

  #drawList() {
    this.at.list.replaceChildren(...this.#rows.map((row) =>
      h("li", { "aria-current": row.id === this.#item?.id, "data-id": row.id },
        h("button", { type: "button", onclick: () => this.#guarded(() => this.open(row.id)) },
          h("span", { class: `outcome ${row.state}` }, words(row.state)),
          h("span", { class: "title" }, row.title || row.id.slice(0, 12)),
          h("small", {}, row.facts.map(words).join(" · "), row.is_mine ? " · judged by me" : "")))));
  }

  #drawProgress({ progress, last_change: lastChange }) {
    this.#lastChange = lastChange;
    const people = Object.entries(progress.by_annotator).map(([name, items]) => `${name} ${items}`);
    this.at.progress.textContent = [`${progress.judged} of ${progress.items} judged`, ...people].join(" · ");
    this.at.bar.max = progress.items || 1;
    this.at.bar.value = progress.judged;
  }

  /** What others judged meanwhile appears by itself; what is typed stays. */
  async #poll() {
    if (document.hidden || !this.root.isConnected || !this.root.offsetParent) return;
    if (this.#unsaved.size) await this.#guarded(async () => { for (const [place, values] of [...this.#unsaved]) await this.#send(place, values); });
    try {
      const found = await this.ask("changes");
      if (found.last_change === this.#lastChange) return;
      this.#drawProgress(found);
      await this.#refresh();
      if (this.#item && !isTyping(document.activeElement)) await this.#fetch(this.#item.id);
    } catch { /* the next time will tell */ }
  }

  /** The states of the rows that are listed. */
  async #refresh() {
    const query = new URLSearchParams({ group: this.at.group.value, state: "all", search: this.at.search.value, annotator: this.annotator, after: "" });
    const now = new Map((await this.ask(`items?${query}`)).rows.map((row) => [row.id, row]));
    this.#rows = this.#rows.map((row) => now.get(row.id) ?? row);
    this.#drawList();
  }

  // ---- one item

  async open(id) {
    this.#editing = false;
    this.#pointer = -1;
    await this.#fetch(id);
    this.#drawList();
    this.at.sheet.scrollTop = 0;
    this.at.list.querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest" });
    history.replaceState(null, "", `#${encodeURIComponent(this.#item.id)}`);
  }

  async #fetch(id) {
    const item = await this.ask(`items/${encodeURIComponent(id)}?${new URLSearchParams({ annotator: this.annotator })}`);
    const inMessages = item.messages.some((_, place) => item.answers.some(({ key }) => key === String(place)));
    // Which answer is left is drawn from the id, so that the judge's choice is not always on one side.
    if (!inMessages && !this.#study.is_blind && item.answers.length === 2 && parseInt(item.id.slice(-1), 36) % 2) item.answers.reverse();
    if (!inMessages && !this.#study.is_blind && item.answers.length === 2) item.answers.forEach((each, at) => { each.name = ["Left", "Right"][at]; });
    this.#item = { ...item, inMessages };
    if (this.#pointer < 0) this.#pointer = Math.max(0, this.#fields().findIndex(({ question, answer }) => (question.of_answer || question.name !== this.#study.main) && this.#mine(answer?.key)[question.name] == null));
    this.#drawItem();
  }

  /** My values about the item, or about one answer. */
  #mine(answer = "") {
    const stored = this.#item.judgments.find((each) => each.annotator === this.annotator && each.answer === answer)?.values;
    return { ...stored, ...this.#unsaved.get(this.#place(answer)) };
  }

  #place(answer) {
    return JSON.stringify([this.annotator, this.#item.id, answer]);
  }

  /** Everything that a digit can answer, in the order in which it is shown. */
  #fields() {
    const ofItem = this.#study.questions.filter((question) => !question.of_answer).map((question) => ({ question, answer: null }));
    const ofAnswers = this.#item.answers.flatMap((answer) => this.#study.questions.filter((question) => question.of_answer).map((question) => ({ question, answer })));
    const all = this.#item.inMessages || !ofItem.length ? [...ofAnswers, ...ofItem] : [...ofItem, ...ofAnswers];
    return all.filter(({ question }) => { const number = Object.keys(question.options).length; return number > 1 && number <= 10; });
  }

  /** Draw the item anew, but not under a finger or a sentence: what is pressed or typed in stays until it is left. */
  #drawItem() {
    const typed = isTyping(document.activeElement) && this.at.sheet.contains(document.activeElement);
    this.#isStale = this.#isPressed || typed;
    if (this.#isStale) return;
    const focused = this.at.sheet.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    this.#drawSheet();
    if (focused) [...this.at.sheet.querySelectorAll("[aria-label]")].find((each) => each.getAttribute("aria-label") === focused)?.focus({ preventScroll: true });
  }

  #drawSheet() {
    const item = this.#item;
    if (!item) return;
    const view = {
      study: this.#study, item, editing: this.#editing, annotator: this.annotator,
      isRevealed: this.#study.is_blind || !this.at.blind.checked || this.#mine().preferred != null,
      mine: (answer) => this.#mine(answer),
      isMarked: (question, answer) => { const marked = this.#fields()[this.#pointer]; return marked?.question === question && marked.answer?.key === answer?.key; },
      say: (values, answer) => this.#guarded(() => this.#say(values, answer)),
    };
    const parts = item.messages.map((message, place) => {
      const answer = item.inMessages ? item.answers.find(({ key }) => key === String(place)) : null;
      return answer ? this.#answer(answer, view, message.role) : h("div", { class: `turn ${message.role}` }, h("h3", {}, message.role), h("div", { class: "text" }, message.content));
    });
    const side = item.inMessages ? null : h("div", { class: "answers" }, ...item.answers.map((answer) => this.#answer(answer, view)));
    const ofItem = this.#study.questions.filter((question) => !question.of_answer);
    const facts = Object.entries(item.facts).map(([name, text]) => h("span", {}, h("b", {}, `${name}: `), words(text)));
    this.at.sheet.replaceChildren(h("h2", {}, item.title), facts.length ? h("p", { class: "facts muted" }, ...facts) : "", ...parts, ...(side ? [side] : []),
      ...(ofItem.length && (item.answers.length || !this.#study.kind.startsWith("review")) ? [h("div", { class: "questions" }, ...ofItem.map((question) => questionFor(question, null, view)))] : []),
      others(view, ""), ...item.further.map(([summary, text]) => h("details", {}, h("summary", {}, summary), h("pre", {}, text))));
  }

  #answer(answer, view, role = null) {
    const questions = this.#study.questions.filter((question) => question.of_answer);
    const isPreferred = this.#mine().preferred === answer.key;
    const facts = view.isRevealed ? Object.values(answer.facts).join(" · ") : "";
    return h("section", { class: isPreferred ? "answer preferred" : "answer", "data-answer": answer.key },
      h("h3", {}, role ?? answer.name, texts(questions, answer, view).isEdited ? " (edited)" : "", h("span", { class: "muted" }, facts)),
      texts(questions, answer, view).element,
      view.isRevealed ? scores(answer) : null,
      h("div", { class: "questions" }, ...questions.filter((question) => !question.shows_answer).map((question) => questionFor(question, answer, view))),
      this.#study.questions.some((question) => question.shows_answer)
        ? h("button", { type: "button", class: "edit", "aria-pressed": this.#editing, onclick: () => this.#edit(answer.key) }, "Write a better answer") : null,
      others(view, answer.key));
  }

  #edit(key = null) {
    this.#editing = !this.#editing;
    this.#drawSheet();
    const sheet = this.at.sheet;
    if (this.#editing) (sheet.querySelector(`[data-answer="${key}"] textarea`) ?? sheet.querySelector(".answer textarea"))?.focus();
  }

  /** Save one change; what the server has stored is then what is shown. */
  async #say(values, answer = "") {
    if (!this.annotator) {
      this.at.annotator.focus();
      throw new Error("Say who you are first: a judgment has a name.");
    }
    const { id } = this.#item, place = this.#place(answer);
    const stored = await this.#send(place, { ...this.#unsaved.get(place), ...values });
    if (this.#item.id === id) {
      this.#item.judgments = [...this.#item.judgments.filter((each) => each.annotator !== stored.annotator || each.answer !== stored.answer), stored];
      this.#drawItem();
    }
    this.at.status.textContent = "Saved";
    this.#drawProgress(await this.ask("changes"));
    await this.#refresh();
  }

  /** What is said while the server is away stays on the page and is sent when it answers again. */
  async #send(place, values) {
    const [annotator, id, answer] = JSON.parse(place);
    this.#unsaved.delete(place);
    try {
      return await this.ask(`items/${encodeURIComponent(id)}/judgments`, { annotator, answer, values });
    } catch (error) {
      if (error instanceof TypeError) this.#unsaved.set(place, values); // fetch's, of a server that is away
      throw error;
    }
  }

  // ---- report and export

  async #report() {
    const { blocks } = await this.ask("report");
    this.#item = null;
    this.#drawList();
    this.at.sheet.replaceChildren(...(blocks.length ? drawReport(blocks) : [h("p", {}, "Nothing to report yet.")]));
  }

  async #export(select) {
    const form = select.value;
    select.value = "";
    if (!form) return;
    const { rows, left_out: leftOut } = await this.ask(`export/${form}`);
    const address = URL.createObjectURL(new Blob(rows.map((row) => `${JSON.stringify(row)}\n`), { type: "application/jsonl" }));
    h("a", { href: address, download: `${form}.jsonl` }).click();
    URL.revokeObjectURL(address);
    const reasons = Object.entries(leftOut).map(([reason, number]) => `${number} left out: ${reason}`);
    this.at.progress.textContent = [`${rows.length} rows saved`, ...reasons].join("; ");
  }

  // ---- keys

  async #step(by) {
    const place = this.#rows.findIndex((row) => row.id === this.#item?.id);
    let next = place < 0 ? 0 : place + by;
    if (next >= this.#rows.length && this.#after) await this.#load({ more: true });
    next = Math.max(0, Math.min(next, this.#rows.length - 1));
    if (this.#rows[next]) await this.open(this.#rows[next].id);
  }

  #mark(by) {
    this.#pointer = Math.max(0, Math.min(this.#pointer + by, this.#fields().length - 1));
    this.#drawItem();
    this.at.sheet.querySelector(".marked")?.scrollIntoView({ block: "nearest" });
  }

  async #digit(digit) {
    const marked = this.#fields()[this.#pointer];
    if (!marked) return;
    const { question, answer } = marked;
    const names = optionsOf(question, this.#item).map(([name]) => name);
    const name = question.is_scale ? String(digit) : names.at(digit - 1); // 0 is the last choice
    if (!names.includes(name)) return;
    this.#pointer = Math.min(this.#pointer + 1, this.#fields().length - 1);
    await this.#say({ [question.name]: question.is_scale ? Number(name) : name }, answer?.key);
  }

  #key(event) {
    if (!this.root.offsetParent || !this.#study) return; // another tab is shown
    if (event.key === "Escape" && isTyping(event.target)) event.target.blur();
    if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
    const work = this.#workOf(event.key);
    if (!work) return;
    event.preventDefault();
    // One after the other: a mark typed right after "next" is meant for the item that is still coming.
    this.#pending = this.#pending.then(() => this.#guarded(work));
  }

  #workOf(key) {
    if (key === "j") return () => this.#step(1);
    if (key === "k") return () => this.#step(-1);
    if (key === "/") return () => this.at.search.focus();
    if (key === "e") return () => this.#item && this.#edit();
    if (key === "c") return () => this.at.sheet.querySelector(".question textarea")?.focus();
    if (key === "n") return () => this.#item && this.#mark(1);
    if (key === "p" && !this.#mainOption(key)) return () => this.#item && this.#mark(-1);
    if (/^[0-9]$/.test(key)) return () => this.#item && this.#digit(Number(key));
    const option = this.#mainOption(key);
    return option && (() => this.#item && this.#say({ [this.#study.main]: this.#mine()[this.#study.main] === option ? null : option }));
  }

  #mainOption(key) {
    const main = this.#study.questions.find(({ name }) => name === this.#study.main);
    return main.of_answer ? undefined : Object.keys(main.options).find((name) => name[0] === key);
  }
}

const words = (name) => name.replaceAll("_", " ");
const isTyping = (target) => target?.matches?.("input:not([type=checkbox]), textarea, select") ?? false;

function scores(answer) {
  const rows = Object.entries(answer.scores).flatMap(([name, value]) => [
    h("span", {}, name), h("meter", { min: 0, max: 4, value, "aria-label": `${name} ${value.toFixed(2)}` }), h("span", { class: "number" }, value.toFixed(2))]);
  return rows.length ? h("div", { class: "bars" }, ...rows) : null;
}

