/** The tab for human red teaming: record a conversation of the chat, and judge what was recorded. */

import { getJson, sendJson } from "./api.js";
import { selectControl, textControl } from "./controls.js";
import { messagesFor, titleOf } from "./conversation.js";
import { h } from "./dom.js";
import { mount as mountJudgments } from "./judgments.js";

const FORMS = { sessions: "Sessions", judgments: "Judgments", preference: "Preference pairs", reward: "Ratings for a reward model" };
const words = (name) => name.replaceAll("_", " ");

/** Draws the tab into its section; `conversation()` is what the chat shows. */
export function mount(root, { settings, conversation }) {
  document.head.append(h("link", { rel: "stylesheet", href: "web/judgments.css" }));
  const record = h("button", { type: "button", class: "primary record" }, "Record this conversation");
  const place = h("div", {});
  root.append(place);
  const ask = (path, body) => (body ? sendJson(`redteam/${path}`, body) : getJson(`redteam/${path}`));
  const page = mountJudgments(place, ask, { before: record, forms: FORMS });
  record.addEventListener("click", () => startRecord(page, ask, conversation()));
  return {
    async shown() {
      settings.replaceChildren(h("h2", {}, "Red team"), h("p", { class: "hint" }, "Attack the model in the chat, then record the conversation here."));
      await page.start();
    },
  };
}

/** What was tried; the judgment follows when the session is there. */
async function startRecord(page, ask, conversation) {
  const last = conversation.turns.length - 1;
  const { sheet } = page.at;
  if (last < 0) {
    sheet.replaceChildren(h("p", { class: "alert", role: "alert" }, "The chat is empty. Have a conversation first."));
    return;
  }
  const { techniques, categories } = await ask("vocabulary");
  const said = { technique: "direct", category: "other", notes: "", lane: 0 };
  const set = (name) => (value) => { said[name] = value; };
  const options = (meanings) => Object.entries(meanings).map(([name, meaning]) => [name, `${words(name)}: ${meaning}`]);
  const lanes = conversation.lanes.map((each, at) => [String(at), `${"AB"[at]}: ${each.model}`]);
  const alert = h("p", { class: "alert", role: "alert", hidden: true });
  const form = h("form", { class: "questions", onsubmit: async (event) => {
    event.preventDefault();
    try {
      if (!page.annotator) throw new Error("Write your name first.");
      const { model, values } = conversation.lanes[said.lane];
      const given = Object.fromEntries(Object.entries(values).filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]));
      const messages = messagesFor(conversation, last, Number(said.lane), { withAnswer: true });
      const { technique, category, notes } = said;
      const kept = await ask("items", { annotator: page.annotator, model, settings: given, messages, technique, category, notes });
      await page.start();
      await page.open(kept.id);
    } catch (error) {
      alert.textContent = error.message;
      alert.hidden = false;
    }
  } },
  h("h2", {}, titleOf(conversation)),
  lanes.length > 1 ? selectControl("lane", "Side", lanes, "0", set("lane")) : null,
  selectControl("technique", "Technique", options(techniques), said.technique, set("technique")),
  selectControl("category", "Category", options(categories), said.category, set("category")),
  textControl("session-notes", "Notes", "", set("notes"), { rows: 2 }),
  alert, h("button", { type: "submit", class: "primary" }, "Record"));
  sheet.replaceChildren(form);
}
