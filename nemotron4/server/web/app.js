/** Starts the page: asks the server what it has, then puts views, list and settings together. */

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { asMarkdown, asRows, firstSide, newConversation, newLane, titleOf } from "./conversation.js";
import { announce, growing, h, iconButton, save } from "./dom.js";
import { Preferences } from "./preferences.js";
import { RawPrompt } from "./raw.js";
import { readFields } from "./schema.js";
import { LaneSettings } from "./settings.js";
import { showSnippets } from "./snippets.js";
import * as store from "./store.js";

const byId = (id) => document.getElementById(id);
const NARROW = matchMedia("(max-width: 56rem)");

class Page {
  #preferences = new Preferences();
  #conversations = [];
  #views = new Map();
  #view = null;

  async start() {
    const [info, fields, conversations] = await Promise.all([getJson("page/info"), readFields(), store.all().catch(() => [])]); // no store: nothing is kept
    this.info = info;
    this.#conversations = conversations;
    byId("model-name").textContent = info.model;
    byId("model").classList.add("ready");
    document.title = `${info.model} \u00b7 nemotron4`;
    const settings = byId("settings");
    this.#lanes = new LaneSettings(settings, info, fields.chat, this.#preferences, { onChange: () => this.#keep(this.#chat.conversation) });
    this.#chat = new Chat(info, fields.chat, this.#preferences, {
      onChange: (conversation) => this.#keep(conversation),
      onSnippets: (body) => showSnippets(body, info),
    });
    this.#raw = new RawPrompt(byId("view-raw"), settings, info, fields.raw, { onSnippets: (body) => showSnippets(body, info, { isRaw: true }) });
    this.#addView("chat", "Chat", () => { this.#lanes.draw(this.#chat.conversation); byId("prompt").focus(); });
    this.#addView("raw", "Raw prompt", () => this.#raw.shown());
    for (const tab of info.tabs) await this.#addTab(tab);
    this.#wire();
    this.#open(conversations[0] ?? newConversation([newLane(info.model)]));
    const wanted = location.hash.slice(1);
    this.#show(this.#views.has(wanted) ? wanted : info.starts_with);
  }

  #lanes;
  #chat;
  #raw;

  #addView(name, title, onShow) {
    const button = h("button", { type: "button", onclick: () => this.#show(name) }, title);
    byId("views").append(button);
    this.#views.set(name, { button, section: byId(`view-${name}`), onShow });
  }

  /** A tab that the server adds: its module draws it, in a section of its own. */
  async #addTab({ name, title }) {
    const section = h("section", { class: "view", id: `view-${name}`, "aria-label": title, hidden: true });
    byId("main").append(section);
    const { mount } = await import(`./${name}.js`);
    const tab = mount(section, { info: this.info, settings: byId("settings"), conversation: () => this.#chat.conversation });
    this.#addView(name, title, () => tab.shown());
  }

  #show(name) {
    this.#view = name;
    history.replaceState(null, "", `#${name}`);
    for (const [each, { button, section }] of this.#views) {
      section.hidden = each !== name;
      if (each === name) button.setAttribute("aria-current", "page");
      else button.removeAttribute("aria-current");
    }
    byId("compare").hidden = name !== "chat";
    document.body.dataset.view = name;
    this.#views.get(name).onShow();
  }

  #open(conversation) {
    this.#chat.open(conversation);
    if (this.#view === "chat") this.#lanes.draw(conversation);
    byId("compare").setAttribute("aria-pressed", String(conversation.lanes.length > 1));
    this.#drawList();
  }

  async #keep(conversation) {
    if (!conversation.turns.length) return;
    if (!this.#conversations.includes(conversation)) this.#conversations.unshift(conversation);
    this.#drawList();
    try {
      await store.put(conversation);
    } catch (error) {
      announce(`This browser did not keep the conversation: ${error.message}`);
    }
  }

  #drawList() {
    const current = this.#chat.conversation;
    byId("conversations").replaceChildren(...this.#conversations.map((each) => {
      const open = h("button", { type: "button", class: "title", "aria-current": each === current ? "true" : null, onclick: () => {
        this.#open(each);
        this.#show("chat");
        if (NARROW.matches) this.#toggle("list", false);
      } }, titleOf(each));
      return h("li", {}, open, this.#exportButton(each), iconButton("trash", `Delete: ${titleOf(each)}`, () => this.#delete(each)));
    }));
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
      save(`${name}.${select.value}`, text(), type);
      select.value = "";
    });
    const sheet = iconButton("save", "", () => {}, { tabindex: "-1", "aria-hidden": "true" });
    return h("span", { class: "export" }, sheet, select);
  }

  async #delete(conversation) {
    this.#conversations = this.#conversations.filter((each) => each !== conversation);
    await store.remove(conversation.id);
    if (conversation === this.#chat.conversation) this.#new();
    else this.#drawList();
    announce("Deleted");
  }

  #new() {
    this.#open(newConversation(this.#chat.conversation.lanes));
    this.#show("chat");
  }

  #compare() {
    if (this.#chat.isRunning) return;
    const { conversation } = this.#chat;
    if (conversation.lanes.length > 1) {
      this.#open(firstSide(conversation)); // a copy: the comparison stays in the list
      return;
    }
    conversation.lanes.push(this.#lanes.secondLane(conversation.lanes[0]));
    for (const turn of conversation.turns) turn.lanes.push(structuredClone(turn.lanes[0]));
    if (!NARROW.matches) this.#toggle("settings", true);
    this.#open(conversation);
    this.#keep(conversation);
  }

  /** Opens or closes one of the side panels. */
  #toggle(id, isOpen = !document.body.classList.contains(`with-${id}`)) {
    document.body.classList.toggle(`with-${id}`, isOpen);
    byId(`show-${id}`).setAttribute("aria-expanded", String(isOpen));
    if (!NARROW.matches) this.#preferences.set(id === "list" ? "isListOpen" : "areSettingsOpen", isOpen);
    else if (isOpen) this.#toggle(id === "list" ? "settings" : "list", false);
  }

  #wire() {
    const prompt = byId("prompt");
    const fit = growing(prompt);
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#chat.isRunning || !prompt.value.trim()) return;
      this.#chat.send(prompt.value);
      prompt.value = "";
      fit();
    });
    prompt.addEventListener("keydown", (event) => {
      // An input method that composes a word uses Enter for itself.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        byId("composer").requestSubmit();
      }
    });
    byId("stop").addEventListener("click", () => { this.#chat.stop(); prompt.focus(); });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (this.#chat.isRunning) this.#chat.stop();
      else if (NARROW.matches) for (const id of ["list", "settings"]) this.#toggle(id, false);
    });
    byId("new").addEventListener("click", () => { this.#new(); if (NARROW.matches) this.#toggle("list", false); });
    byId("delete-all").addEventListener("click", async () => {
      if (!confirm("Delete every conversation in this browser?")) return;
      this.#conversations = [];
      await store.clear();
      this.#new();
    });
    byId("compare").addEventListener("click", () => this.#compare());
    for (const id of ["list", "settings"]) byId(`show-${id}`).addEventListener("click", () => this.#toggle(id));
    if (!NARROW.matches) {
      this.#toggle("list", this.#preferences.get("isListOpen"));
      this.#toggle("settings", this.#preferences.get("areSettingsOpen"));
    }
  }
}

new Page().start().catch((error) => {
  byId("model-name").textContent = "not connected";
  byId("main").replaceChildren(h("p", { class: "alert", role: "alert" }, error.message));
});
