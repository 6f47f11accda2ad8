/** The settings of a conversation's lanes: model, system turn, sampling. */

import { checkControl, arrowKeys, numberControl, schemaControl, selectControl, tabs, textControl } from "./controls.js";
import { laneName, newLane } from "./conversation.js";
import { h } from "./dom.js";

/** In this order; a field that the server does not know is left out. */
export const CHAT_FIELDS = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens",
  "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
];

export class LaneSettings {
  #root;
  #info;
  #fields;
  #hasSchema;
  #preferences;
  #lane = 0;

  /** @param {{onChange: () => void}} options */
  constructor(root, info, fields, preferences, { onChange }) {
    this.#root = root;
    this.#info = info;
    this.#fields = fields.chat;
    this.#hasSchema = fields.hasSchema;
    this.#preferences = preferences;
    this.onChange = onChange;
  }

  /** Draws the settings of a conversation, which are changed in place. */
  draw(conversation) {
    this.#lane = Math.min(this.#lane, conversation.lanes.length - 1);
    const lane = conversation.lanes[this.#lane];
    const changed = () => this.onChange();
    const parts = [h("h2", {}, "Settings")];
    if (conversation.lanes.length > 1) {
      const list = h("div", { class: "tabs", role: "tablist", "aria-label": "Side" });
      list.append(...tabs(conversation.lanes.map((each, number) => [number, `${laneName(number)} \u00b7 ${each.model}`]), this.#lane, (number) => {
        this.#lane = number;
        this.draw(conversation);
      }));
      arrowKeys(list);
      parts.push(list);
    }
    if (this.#info.other?.name) {
      const models = [["own", this.#info.model], ["other", this.#info.other.name]];
      parts.push(selectControl("lane-model", "Model", models, lane.isOther ? "other" : "own", (key) => {
        Object.assign(lane, this.#model(key === "other"));
        changed();
        this.draw(conversation);
      }));
    } else if (this.#info.other) {
      parts.push(h("p", { class: "alert" }, `The second model is not there: ${this.#info.other.error}`));
    }
    parts.push(textControl("system", "System turn", lane.system, (text) => { lane.system = text; changed(); }, { rows: 3, placeholder: "Empty, as in the model card" }));
    for (const name of CHAT_FIELDS) {
      const field = this.#fields[name];
      if (field) parts.push(numberControl(field, lane.values[name] ?? "", (text) => { lane.values[name] = text; changed(); }));
    }
    parts.push(textControl("stop-strings", "Stop strings", lane.stop, (text) => { lane.stop = text; changed(); }, { hint: "One a line." }));
    if (this.#hasSchema) parts.push(schemaControl(lane.schema ?? "", (text) => { lane.schema = text; changed(); }));
    parts.push(checkControl("probabilities", "Token probabilities", this.#preferences.get("probabilities"), (isOn) => this.#preferences.set("probabilities", isOn),
      "Colours each token of new answers by how unlikely it was. Point at one, or click it for its alternatives."));
    parts.push(h("button", { type: "button", class: "link", onclick: () => {
      Object.assign(lane, { ...newLane(lane.model, lane.isOther), system: lane.system });
      changed();
      this.draw(conversation);
    } }, "Without settings: the API's defaults"));
    this.#root.replaceChildren(...parts);
  }

  #model(isOther) {
    return { isOther, model: isOther ? this.#info.other.name : this.#info.model };
  }

  /** What a second lane starts with: the other model if there is one, else a copy to change. */
  secondLane(first) {
    return this.#info.other?.name ? { ...structuredClone(first), ...this.#model(true) } : structuredClone(first);
  }
}
