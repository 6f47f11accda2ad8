/** Starts the page: asks the server what it has, then puts views, list and settings together. */

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { firstSide, newConversation, newLane, opened } from "./conversation.js";
import { announce, growing, h } from "./dom.js";
import { ConversationList } from "./list.js";
import { Preferences } from "./preferences.js";
import { RawPrompt } from "./raw.js";
import { readFields } from "./schema.js";
import { LaneSettings } from "./settings.js";
import { showSnippets } from "./snippets.js";
import * as store from "./store.js";

const byId = (id) => document.getElementById(id);
const NARROW = matchMedia("(max-width: 56rem)");
const ASK_HEALTH_MS = 5000;
const KEEP_DRAFT_MS = 300;

class Page {
  #preferences = new Preferences();
  #views = new Map();
  #view = null;
  #list;
  #lanes;
  #chat;
  #raw;
  #fit;
  #draftTimer = null;
  #merged = new Set(); // conversations with something from another tab that is not drawn yet

  async start() {
    const [info, fields, conversations] = await Promise.all([getJson("page/info"), readFields(), store.all().catch(() => [])]); // no store: nothing is kept
    this.info = info;
    conversations.forEach(store.knows);
    byId("model-name").textContent = info.model;
    document.title = `${info.model} \u00b7 nemotron4`;
    const settings = byId("settings");
    this.#lanes = new LaneSettings(settings, info, fields, this.#preferences, { onChange: () => this.#keep(this.#chat.conversation) });
    this.#chat = new Chat(info, fields.chat, this.#preferences, {
      onChange: (conversation) => this.#keep(conversation),
      onSnippets: (body) => showSnippets(body, info),
    });
    this.#list = new ConversationList(store, {
      current: () => this.#chat.conversation,
      lanes: () => this.#chat.conversation.lanes,
      onNew: () => this.#new(),
      onOpen: (conversation) => {
        this.#open(conversation);
        this.#show("chat");
        if (NARROW.matches) this.#toggle("list", false);
      },
    });
    this.#list.conversations = conversations;
    this.#raw = new RawPrompt(byId("view-raw"), settings, info, fields, { onSnippets: (body, path) => showSnippets(body, info, path) });
    this.#addView("chat", "Chat", () => { this.#lanes.draw(this.#chat.conversation); byId("prompt").focus(); });
    this.#addView("raw", "Raw prompt", () => this.#raw.shown());
    for (const tab of info.tabs) await this.#addTab(tab);
    this.#wire();
    this.#open(conversations[0] ?? this.#fresh());
    const wanted = location.hash.slice(1);
    this.#show(this.#views.has(wanted) ? wanted : info.starts_with);
    store.watch((id) => this.#another(id));
    this.#watchServer();
  }

  #fresh() {
    const lane = newLane(this.info.model);
    for (const [name, value] of Object.entries(this.info.sampling)) lane.values[name] = String(value);
    return newConversation([lane]);
  }

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
    byId("prompt").value = conversation.draft;
    this.#fit();
    if (this.#view === "chat") this.#lanes.draw(conversation);
    byId("compare").setAttribute("aria-pressed", String(conversation.lanes.length > 1));
    this.#list.draw();
  }

  async #keep(conversation) {
    if (!conversation.turns.length && !conversation.draft) return;
    const { conversations } = this.#list;
    if (!conversations.includes(conversation)) conversations.unshift(conversation);
    this.#list.draw();
    try {
      if (await store.put(conversation)) this.#merged.add(conversation);
      if (conversation === this.#chat.conversation && !this.#chat.isRunning && this.#merged.delete(conversation)) this.#chat.redraw();
    } catch (error) {
      announce(`This browser did not keep the conversation: ${error.message}`);
    }
  }

  /** Another tab wrote or removed a conversation. */
  async #another(id) {
    const { conversations } = this.#list;
    const mine = conversations.find((each) => each.id === id);
    const stored = await store.get(id);
    if (!stored) {
      if (mine && mine !== this.#chat.conversation) this.#list.conversations = conversations.filter((each) => each !== mine);
    } else if (!mine) {
      conversations.unshift(opened(stored));
    } else if (mine === this.#chat.conversation) {
      return; // merged when it is kept next: nothing moves under the reader
    } else {
      Object.assign(mine, opened(stored));
      store.knows(mine);
    }
    this.#list.draw();
  }

  #new() {
    const { conversation } = this.#chat;
    const next = this.#fresh();
    if (conversation) next.lanes = structuredClone(conversation.lanes);
    this.#open(next);
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

  /** The panels as this width has them: beside the view, or closed where they would cover it. */
  #fitPanels() {
    for (const [id, name] of [["list", "isListOpen"], ["settings", "areSettingsOpen"]]) {
      const isOpen = !NARROW.matches && this.#preferences.get(name);
      document.body.classList.toggle(`with-${id}`, isOpen);
      byId(`show-${id}`).setAttribute("aria-expanded", String(isOpen));
    }
  }

  /** Sends what the field holds; not while a setting is wrong, which would be sent as something else. */
  #send() {
    const prompt = byId("prompt");
    if (this.#chat.isRunning || !prompt.value.trim()) return;
    const wrong = byId("settings").querySelector("[aria-invalid=true]");
    if (wrong) {
      this.#toggle("settings", true);
      wrong.focus();
      announce("A setting is wrong; nothing was sent.");
      return;
    }
    clearTimeout(this.#draftTimer);
    this.#chat.conversation.draft = "";
    this.#chat.send(prompt.value);
    prompt.value = "";
    this.#fit();
  }

  #wire() {
    const prompt = byId("prompt");
    this.#fit = growing(prompt);
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    prompt.addEventListener("input", () => {
      const { conversation } = this.#chat;
      conversation.draft = prompt.value;
      clearTimeout(this.#draftTimer);
      this.#draftTimer = setTimeout(() => this.#keep(conversation), KEEP_DRAFT_MS);
    });
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "ArrowUp" && !prompt.value && this.#chat.editLast()) event.preventDefault();
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
    byId("compare").addEventListener("click", () => this.#compare());
    for (const id of ["list", "settings"]) byId(`show-${id}`).addEventListener("click", () => this.#toggle(id));
    NARROW.addEventListener("change", () => this.#fitPanels());
    this.#fitPanels();
  }

  /** The dot is green while the server answers; when it does not, the page says so and asks again. */
  async #watchServer() {
    const box = byId("model");
    let isThere = true;
    const tell = (now) => {
      box.classList.toggle("ready", now);
      box.classList.toggle("gone", !now);
      byId("model-name").textContent = now ? this.info.model : `${this.info.model}: no answer, trying again`;
      if (now !== isThere) announce(now ? "The server answers again" : "The server does not answer. The page tries again.");
      isThere = now;
    };
    tell(true);
    for (;;) {
      await new Promise((resolve) => { setTimeout(resolve, ASK_HEALTH_MS); });
      if (document.hidden) continue;
      tell(await fetch("health").then((response) => response.ok, () => false));
    }
  }
}

new Page().start().catch((error) => {
  byId("model-name").textContent = "not connected";
  byId("main").replaceChildren(h("p", { class: "alert", role: "alert" }, error.message));
});
