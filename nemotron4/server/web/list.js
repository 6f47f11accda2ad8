/** The list of conversations: search, groups by date, rename, export, import, delete with a way back. */

import { asMarkdown, asRows, fromFile, titleOf } from "./conversation.js";
import { announce, h, iconButton, save } from "./dom.js";

const DAY_MS = 86_400_000;
const UNDO_MS = 10_000;

export class ConversationList {
  conversations = [];
  #root = document.getElementById("conversations");
  #search = document.getElementById("search");
  #toast = document.getElementById("toast");
  #store;
  #options;
  #timer = null;

  /**
   * @param {{put: (conversation) => Promise, remove: (id: string) => Promise}} store
   * @param {{current: () => object, onOpen: (conversation) => void, onNew: () => void, lanes: () => object[]}} options
   */
  constructor(store, options) {
    this.#store = store;
    this.#options = options;
    this.#search.addEventListener("input", () => this.draw());
    const file = document.getElementById("import-file");
    document.getElementById("import").addEventListener("click", () => file.click());
    file.addEventListener("change", () => this.#import(file));
    document.getElementById("delete-all").addEventListener("click", () => this.#delete([...this.conversations]));
  }

  draw() {
    const wanted = this.#search.value.trim().toLowerCase();
    const shown = this.conversations.filter((each) => !wanted || textOf(each).includes(wanted));
    const groups = Map.groupBy ? Map.groupBy(shown, ageOf) : grouped(shown);
    const parts = [...groups].map(([name, members]) => h("li", {}, h("h2", {}, name), h("ul", {}, ...members.map((each) => this.#item(each)))));
    this.#root.replaceChildren(...parts);
    if (!shown.length && wanted) this.#root.replaceChildren(h("li", { class: "hint" }, "Nothing found."));
  }

  #item(conversation) {
    const current = this.#options.current();
    const title = titleOf(conversation);
    const open = h("button", { type: "button", class: "title", "aria-current": conversation === current ? "true" : null, onclick: () => this.#options.onOpen(conversation) }, title);
    const rename = iconButton("edit", `Rename: ${title}`, () => this.#rename(conversation, open));
    return h("li", {}, open, rename, this.#exportButton(conversation), iconButton("trash", `Delete: ${title}`, () => this.#delete([conversation])));
  }

  #rename(conversation, open) {
    const field = h("input", { type: "text", "aria-label": "Title", maxlength: "80" });
    field.value = titleOf(conversation);
    const done = async (isKept) => {
      field.removeEventListener("blur", keep);
      if (isKept && field.value.trim() !== titleOf(conversation)) {
        conversation.title = field.value.trim();
        await this.#store.put(conversation);
      }
      this.draw();
    };
    const keep = () => done(true);
    field.addEventListener("blur", keep);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        done(false);
      }
    });
    open.replaceWith(field);
    field.select();
  }

  #exportButton(conversation) {
    const name = titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "conversation";
    const kinds = {
      md: ["Markdown", () => asMarkdown(conversation), "text/markdown"],
      jsonl: ["JSONL, messages", () => asRows(conversation), "application/jsonl"],
      json: ["JSON, everything", () => JSON.stringify(conversation, null, 1), "application/json"],
    };
    const select = h("select", { "aria-label": `Export: ${titleOf(conversation)}`, title: "Export" },
      h("option", { value: "" }, "Export as\u2026"), ...Object.entries(kinds).map(([key, [text]]) => h("option", { value: key }, text)));
    select.addEventListener("change", () => {
      const [, text, type] = kinds[select.value];
      const written = text();
      if (written) save(`${name}.${select.value}`, written, type);
      else this.#say("Nothing to export: no turn has an answer.");
      select.value = "";
    });
    const sheet = iconButton("save", "", () => {}, { tabindex: "-1", "aria-hidden": "true" });
    return h("span", { class: "export" }, sheet, select);
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      const found = fromFile(await file.text(), this.#options.lanes());
      for (const conversation of found) await this.#store.put(conversation);
      this.conversations.unshift(...found);
      this.#say(`${found.length} ${found.length === 1 ? "conversation" : "conversations"} imported from ${file.name}.`);
      if (found.length) this.#options.onOpen(found[0]);
    } catch (error) {
      this.#say(`${file.name} was not imported. ${error.message}`);
    }
  }

  async #delete(gone) {
    if (!gone.length) return;
    this.conversations = this.conversations.filter((each) => !gone.includes(each));
    for (const { id } of gone) await this.#store.remove(id);
    if (gone.includes(this.#options.current())) this.#options.onNew();
    else this.draw();
    const what = gone.length === 1 ? `Deleted: ${titleOf(gone[0])}` : `Deleted ${gone.length} conversations`;
    this.#say(what, async () => {
      for (const conversation of gone) await this.#store.put(conversation);
      this.conversations = [...gone, ...this.conversations].sort((one, other) => other.updated - one.updated);
      this.#options.onOpen(gone[0]);
    });
  }

  /** A line at the foot of the window, for a while; with a button that takes the thing back. */
  #say(text, undo = null) {
    clearTimeout(this.#timer);
    const hide = () => { this.#toast.hidden = true; };
    this.#toast.replaceChildren(h("span", {}, text),
      undo && h("button", { type: "button", class: "link", onclick: () => { hide(); undo(); } }, "Undo"));
    this.#toast.hidden = false;
    announce(text);
    this.#timer = setTimeout(hide, UNDO_MS);
  }
}

function textOf(conversation) {
  const answers = conversation.turns.flatMap(({ user, lanes }) => [user, ...lanes.flatMap((lane) => lane.answers.map(({ text }) => text))]);
  return [titleOf(conversation), ...answers].join("\n").toLowerCase();
}

function ageOf({ updated }) {
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - updated) / DAY_MS);
  if (days < 1) return "Today";
  if (days < 2) return "Yesterday";
  if (days < 7) return "Last seven days";
  return new Date(updated).toLocaleDateString("en", { month: "long", year: "numeric" });
}

function grouped(conversations) {
  const groups = new Map();
  for (const each of conversations) groups.set(ageOf(each), [...(groups.get(ageOf(each)) ?? []), each]);
  return groups;
}
