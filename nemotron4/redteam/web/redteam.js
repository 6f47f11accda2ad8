/** The tab for human red teaming: record a conversation, judge it, rate its answers, export what came of it. */

import { getJson, sendJson } from "./api.js";
import { selectControl, textControl } from "./controls.js";
import { messagesFor, titleOf } from "./conversation.js";
import { announce, h, save } from "./dom.js";

const HANDLE = "nemotron4.annotator";
const EXPORTS = [["sessions", "Sessions"], ["preference", "Preference pairs"], ["reward", "Ratings for a reward model"]];
const words = (name) => name.replaceAll("_", " ");

/** Draws the tab into its section; `conversation()` is what the chat shows. */
export function mount(root, { settings, conversation }) {
  return new Workspace(root, settings, conversation);
}

class Workspace {
  #vocabulary = null;
  #filter = "";
  #list = h("ul", { class: "records", "aria-label": "Recorded sessions" });
  #sheet = h("div", { class: "sheet" });
  #root;
  #settings;
  #conversation;

  constructor(root, settings, conversation) {
    this.#root = root;
    this.#settings = settings;
    this.#conversation = conversation;
    const record = h("button", { type: "button", class: "primary", onclick: () => this.#startRecord() }, "Record this conversation");
    root.append(h("div", { class: "workspace" },
      h("div", { class: "records-side" }, record, this.#exports(), this.#list),
      this.#sheet));
  }

  async shown() {
    this.#drawSettings();
    try {
      this.#vocabulary ??= await getJson("redteam/vocabulary");
      await this.#refresh();
      if (!this.#sheet.hasChildNodes()) this.#welcome();
    } catch (error) {
      this.#fail(error);
    }
  }

  #drawSettings() {
    const handle = textControl("annotator", "Your handle", localStorage.getItem(HANDLE) ?? "", (text) => localStorage.setItem(HANDLE, text.trim()), { rows: 1, hint: "Stands beside everything you record here." });
    const outcomes = [["", "every outcome"], ...["success", "partial", "failure", "unclear"].map((name) => [name, name])];
    const filter = selectControl("outcome-filter", "Show", outcomes, this.#filter, (value) => { this.#filter = value; this.#refresh(); });
    this.#settings.replaceChildren(h("h2", {}, "Annotation"), handle, filter);
  }

  #exports() {
    const select = h("select", { id: "export-sessions", "aria-label": "Export" }, h("option", { value: "" }, "Export as JSONL\u2026"), ...EXPORTS.map(([key, text]) => h("option", { value: key }, text)));
    select.addEventListener("change", async () => {
      const form = select.value;
      select.value = "";
      const { rows, left_out: leftOut } = await getJson(`redteam/export/${form}`);
      save(`redteam-${form}.jsonl`, rows.map((row) => `${JSON.stringify(row)}\n`).join(""), "application/jsonl");
      const reasons = Object.entries(leftOut).map(([reason, number]) => `${number} left out: ${reason}`);
      this.#note.textContent = [`${rows.length} rows saved`, ...reasons].join("; ");
    });
    return h("div", {}, select, this.#note);
  }

  #note = h("p", { class: "note", role: "status" });

  async #refresh() {
    const { sessions } = await getJson(`redteam/sessions${this.#filter ? `?outcome=${this.#filter}` : ""}`);
    this.#list.replaceChildren(...sessions.map((session) => h("li", {},
      h("button", { type: "button", onclick: () => this.#open(session.id) },
        h("span", { class: `outcome ${session.outcome ?? ""}` }, session.outcome ?? "not judged"),
        h("span", {}, `${words(session.category)}, ${words(session.technique)}`),
        h("small", {}, `${session.annotator} \u00b7 ${session.model} \u00b7 ${session.recorded_at.slice(0, 10)}`)))));
    if (!sessions.length) this.#list.replaceChildren(h("li", { class: "hint" }, "Nothing recorded yet."));
  }

  #welcome() {
    this.#sheet.replaceChildren(h("div", { class: "welcome" }, h("h2", {}, "Red team"),
      h("p", {}, "Attack the model in the chat. Then record the conversation here: what you tried, whether it worked, how bad the answers are, and what a good answer would have been.")));
  }

  #startRecord() {
    const conversation = this.#conversation();
    const last = conversation.turns.length - 1;
    if (last < 0) {
      this.#sheet.replaceChildren(h("p", { class: "alert", role: "alert" }, "The chat is empty. Have a conversation first."));
      return;
    }
    const draw = (lane) => {
      const messages = messagesFor(conversation, last, lane, { withAnswer: true });
      const { model, values } = conversation.lanes[lane];
      const choice = conversation.lanes.length > 1
        ? selectControl("lane", "Side", conversation.lanes.map((each, number) => [String(number), `${"AB"[number]}: ${each.model}`]), String(lane), (value) => draw(Number(value)))
        : null;
      this.#drawForm(titleOf(conversation), messages, { choice, create: { model, settings: values } });
    };
    draw(0);
  }

  async #open(id) {
    try {
      const session = await getJson(`redteam/sessions/${id}`);
      this.#drawForm(`${words(session.category)}, ${words(session.technique)}`, session.messages, { session });
    } catch (error) {
      this.#fail(error);
    }
  }

  /** The conversation with what can be said about it. `create` makes a new session, `session` adds to one. */
  #drawForm(title, messages, { choice = null, create = null, session = null }) {
    const { techniques, categories, outcomes, severities, attributes } = this.#vocabulary;
    const options = (meanings) => Object.entries(meanings).map(([name, meaning]) => [name, `${words(name)}: ${meaning}`]);
    const said = { technique: "direct", category: session?.category ?? "other", outcome: "", severity: "", notes: "" };
    const set = (name) => (value) => { said[name] = value; };
    const answers = new Map(); // place -> {ratings, correction}
    const articles = messages.map((message, place) => {
      if (message.role === "assistant") answers.set(place, { ratings: {}, correction: "" });
      return this.#message(message, place, attributes, answers.get(place), session);
    });
    const alert = h("p", { class: "alert", role: "alert", hidden: true });
    const form = h("form", { class: "review", onsubmit: async (event) => {
      event.preventDefault();
      alert.hidden = true;
      try {
        const isEmpty = !said.outcome && [...answers.values()].every(({ ratings, correction }) => !Object.keys(ratings).length && !correction.trim());
        if (session && isEmpty) throw new Error("Nothing to add yet: choose an outcome, a rating or write a better answer.");
        const id = session?.id ?? (await this.#create(create, messages, said)).id;
        await this.#send(id, said, answers);
        announce("Saved");
        await this.#refresh();
        await this.#open(id);
      } catch (error) {
        alert.textContent = error.message;
        alert.hidden = false;
      }
    } },
    h("h2", {}, title),
    choice,
    session ? this.#verdicts(session) : null,
    ...articles,
    create ? selectControl("technique", "Technique", options(techniques), said.technique, set("technique")) : null,
    selectControl("category", "Category", options(categories), said.category, set("category")),
    selectControl("outcome", "Outcome", [["", "not judged"], ...options(outcomes)], "", set("outcome")),
    selectControl("severity", "Severity of the worst answer", [["", "not judged"], ...severities.map((word, number) => [String(number), `${number}: ${word}`])], "", set("severity")),
    textControl("notes", "Notes", "", set("notes"), { rows: 2 }),
    alert,
    h("div", { class: "row end" }, h("button", { type: "submit", class: "primary" }, create ? "Record" : "Add")));
    this.#sheet.replaceChildren(form);
    this.#sheet.scrollTop = 0;
  }

  #message({ role, content }, place, attributes, answer, session) {
    const head = h("h3", {}, role);
    const text = h("div", { class: "text plain" }, content);
    if (!answer) return h("article", { class: `message ${role}` }, head, text);
    const rating = h("fieldset", { class: "ratings" }, h("legend", {}, "Rating, 0 to 4"), ...attributes.map((name) => {
      const select = h("select", { id: `rate-${place}-${name}` }, ...["", 0, 1, 2, 3, 4].map((value) => h("option", { value }, value === "" ? "\u2013" : String(value))));
      select.addEventListener("change", () => {
        if (select.value === "") delete answer.ratings[name];
        else answer.ratings[name] = Number(select.value);
      });
      return h("div", {}, h("label", { for: `rate-${place}-${name}` }, name), select);
    }));
    const given = (session?.ratings ?? []).filter((each) => each.answer === place).map((each) => h("p", { class: "note" }, `${each.annotator}: ${Object.entries(each.attributes).map(([name, value]) => `${name} ${value}`).join(", ")}`));
    const better = (session?.corrections ?? []).filter((each) => each.answer === place).map((each) => h("p", { class: "note" }, `${each.annotator} would have said: ${each.text}`));
    return h("article", { class: `message ${role}` }, head, text, ...given, ...better, rating,
      h("details", {}, h("summary", {}, "A better answer"), textControl(`better-${place}`, "What the model should have said", "", (value) => { answer.correction = value; })));
  }

  #verdicts({ assessments }) {
    if (!assessments.length) return null;
    return h("ul", { class: "verdicts" }, ...assessments.map((each) => h("li", {},
      h("span", { class: `outcome ${each.outcome}` }, each.outcome),
      ` ${each.annotator}${each.severity === null ? "" : `, severity ${each.severity}`}${each.notes ? `: ${each.notes}` : ""}`)));
  }

  #create({ model, settings }, messages, { technique, category, notes }) {
    const given = Object.fromEntries(Object.entries(settings).filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]));
    return sendJson("redteam/sessions", { annotator: this.#annotator(), model, settings: given, messages, technique, category, notes });
  }

  async #send(id, { outcome, severity, category, notes }, answers) {
    const annotator = this.#annotator();
    const add = (kind, row) => sendJson(`redteam/sessions/${id}/${kind}`, { annotator, ...row });
    if (outcome) await add("assessments", { outcome, category, severity: severity === "" ? null : Number(severity), notes });
    for (const [place, { ratings, correction }] of answers) {
      if (Object.keys(ratings).length) await add("ratings", { answer: place, attributes: ratings });
      if (correction.trim()) await add("corrections", { answer: place, text: correction });
    }
  }

  #annotator() {
    const handle = localStorage.getItem(HANDLE) ?? "";
    if (handle) return handle;
    document.getElementById("annotator").focus();
    throw new Error("Write your handle under Settings first.");
  }

  #fail(error) {
    this.#sheet.replaceChildren(h("p", { class: "alert", role: "alert" }, error.message));
  }
}
