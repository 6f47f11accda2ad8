/**
 * Raw prompts: `PUT /generate`, the server's own contract, with the model card's template to start from. NeMo's
 * request has no schema, so an answer that has to fit one comes from `POST /v1/completions`, equally without template.
 */

import { request } from "./api.js";
import { checkControl, numberControl, schemaControl, textControl } from "./controls.js";
import { announce, copyText, growing, h, iconButton, save } from "./dom.js";
import { drawTokens, tokenText } from "./tokens.js";

const FIELDS = ["tokens_to_generate", "temperature", "top_k", "top_p", "repetition_penalty", "min_tokens_to_generate", "random_seed"];

export class RawPrompt {
  #info;
  #fields;
  #settings;
  #onSnippets;
  #prompt;
  #fit;
  #output = h("div", { class: "raw-output", "aria-live": "polite" });
  #run;
  #stop;
  #controller = null;
  #values = { tokens_to_generate: "256" };
  #isGreedy = true;
  #ends;
  #withLogprobs = true;
  #hasSchema;
  #schema = "";
  #text = "";

  constructor(root, settings, info, fields, { onSnippets }) {
    this.#info = info;
    this.#fields = fields.raw;
    this.#hasSchema = fields.hasSchema;
    this.#settings = settings;
    this.#onSnippets = onSnippets;
    this.#ends = info.card.end_strings.map(escaped).join("\n");
    this.#prompt = h("textarea", { id: "raw-prompt", rows: 8, spellcheck: "false" });
    this.#fit = growing(this.#prompt);
    this.#run = h("button", { type: "submit", class: "primary" }, "Generate");
    this.#stop = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.#controller?.abort() }, "Stop");
    const form = h("form", { class: "raw", onsubmit: (event) => { event.preventDefault(); this.generate(); } },
      h("div", { class: "row between" },
        h("label", { for: "raw-prompt" }, "Prompt, sent as it is"),
        this.#presets()),
      this.#prompt,
      h("div", { class: "row" }, this.#run, this.#stop,
        h("button", { type: "button", class: "quiet", onclick: () => onSnippets(this.#body(), this.#path) }, "Copy as\u2026"),
        h("p", { class: "hint" }, h("code", {}, "PUT /generate"), " applies no template: markers such as ", h("code", {}, "<extra_id_1>"), " are yours to write.")),
      this.#output);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.generate();
      if (event.key === "Escape") this.#controller?.abort();
    });
    root.append(form);
    this.useTemplate();
  }

  /** Texts to start from: the card's template around a question, and plain text for a model without one. */
  #presets() {
    const { prompt, question } = this.#info.card;
    const around = (text) => [prompt.replace(question, text), text];
    const presets = {
      card: ["The card's template", [prompt, question]],
      sum: ["A task with an answer to check", around("A box holds 12 pencils. How many pencils are in 7 boxes? Answer with the number alone.")],
      extract: ["Extraction", around("List every date in this text, one a line: The bridge was begun on 3 May 1911 and opened on 19 June 1914.")],
      self: ["The user's turn alone: the model asks itself", [prompt.slice(0, prompt.indexOf(question)), ""]],
      plain: ["Plain text to continue", ["The three states of water are", "The three states of water are"]],
    };
    const select = h("select", { "aria-label": "Start from" }, ...Object.entries(presets).map(([key, [text]]) => h("option", { value: key }, text)));
    select.addEventListener("change", () => this.use(...presets[select.value][1]));
    return select;
  }

  /** The prompt of the model card, its question selected for typing over. */
  useTemplate() {
    this.use(this.#info.card.prompt, this.#info.card.question);
  }

  use(prompt, question) {
    this.#prompt.value = prompt;
    const start = question ? prompt.indexOf(question) : prompt.length;
    this.#fit();
    this.#prompt.setSelectionRange(start, start + question.length);
    this.#prompt.focus({ preventScroll: true });
  }

  shown() {
    this.#fit();
    this.#prompt.focus({ preventScroll: true });
    this.drawSettings();
  }

  drawSettings() {
    const parts = [h("h2", {}, "Settings"), checkControl("greedy", "Greedy", this.#isGreedy, (isOn) => { this.#isGreedy = isOn; }, "The most likely token each time; sampling settings are then ignored.")];
    for (const name of FIELDS) {
      const field = this.#fields[name];
      if (field) parts.push(numberControl(field, this.#values[name] ?? "", (text) => { this.#values[name] = text; }));
    }
    parts.push(textControl("end-strings", "End strings", this.#ends, (text) => { this.#ends = text; }, { rows: 5, hint: "One a line; \\n and \\x11 are written like that." }));
    if (this.#hasSchema) parts.push(schemaControl(this.#schema, (text) => { this.#schema = text.trim(); }));
    parts.push(checkControl("raw-probabilities", "Token probabilities", this.#withLogprobs, (isOn) => { this.#withLogprobs = isOn; }));
    this.#settings.replaceChildren(...parts);
  }

  get #path() {
    return this.#schema ? "v1/completions" : "generate";
  }

  #body() {
    const numbers = Object.entries(this.#values).filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]);
    const ends = this.#ends.split("\n").filter((line) => line !== "").map(unescaped);
    if (this.#schema) return this.#completion(Object.fromEntries(numbers), ends);
    return {
      sentences: [this.#prompt.value],
      ...Object.fromEntries(numbers),
      greedy: this.#isGreedy,
      end_strings: ends,
      compute_logprob: this.#withLogprobs,
    };
  }

  /** The same settings under OpenAI's names. */
  #completion({ tokens_to_generate: maxTokens, min_tokens_to_generate: minTokens, random_seed: seed, ...values }, stop) {
    const body = {
      model: this.#info.model,
      prompt: this.#prompt.value,
      max_tokens: maxTokens,
      min_tokens: minTokens,
      seed,
      ...values,
      ...(this.#isGreedy && { temperature: 0 }),
      stop,
      logprobs: this.#withLogprobs ? 1 : undefined,
      response_format: { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(this.#schema) } },
    };
    return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined));
  }

  async generate() {
    if (this.#controller) return;
    const wrong = this.#settings.querySelector("[aria-invalid=true]");
    if (wrong) {
      announce("A setting is wrong; nothing was sent.");
      wrong.focus();
      return;
    }
    const body = this.#body();
    this.#controller = new AbortController();
    this.#run.hidden = true;
    this.#stop.hidden = false;
    this.#output.replaceChildren(h("p", { class: "note running" }, "Generating\u2026"));
    const started = performance.now();
    try {
      const response = await request(this.#path, { method: body.prompt === undefined ? "PUT" : "POST", body, signal: this.#controller.signal });
      const answer = await response.json();
      if (typeof answer === "string") throw new Error(answer); // NeMo refuses with status 200
      this.#draw(answer.choices ? fromOpenAi(answer) : fromNemo(body, answer), (performance.now() - started) / 1000);
    } catch (error) {
      const text = error.name === "AbortError" ? "Stopped." : error.message;
      this.#output.replaceChildren(h("p", { class: "alert", role: "alert" }, text));
    }
    this.#controller = null;
    this.#run.hidden = false;
    this.#stop.hidden = true;
  }

  #draw({ completion, tokens }, seconds) {
    this.#text = this.#prompt.value + completion;
    const shown = tokens ? tokenText() : h("div", { class: "text plain" }, completion);
    if (tokens) drawTokens(shown, tokens);
    const copy = iconButton("copy", "Copy completion", () => copyText(completion, copy));
    this.#output.replaceChildren(
      h("h3", {}, "Completion"),
      h("div", { class: "text" }, shown),
      h("div", { class: "actions" }, copy,
        tokens && iconButton("save", "Save the token probabilities", () => save("tokens.json", JSON.stringify(tokens, null, 1))),
        h("button", { type: "button", class: "link", onclick: () => { this.#prompt.value = this.#text; this.#fit(); this.#prompt.focus(); } }, "Continue from here"),
        h("p", { class: "note" }, `${seconds.toFixed(1)} s`)));
    announce("Generated");
  }
}

/** The text after the prompt, and its tokens where they were asked for. */
function fromNemo(body, answer) {
  const completion = answer.sentences[0].slice(body.sentences[0].length);
  return { completion, tokens: body.compute_logprob ? completionTokens(answer, completion) : null };
}

function fromOpenAi({ choices: [{ text, logprobs }] }) {
  const tokens = logprobs?.tokens.map((token, number) => ({ text: token, logprob: logprobs.token_logprobs[number], top: [] }));
  return { completion: text, tokens: tokens?.map((token) => token.text).join("") === text ? tokens : null };
}

/**
 * The tokens that spell the completion, with their log-probabilities; null when pieces and text do not agree,
 * as with a character that is split over byte pieces.
 */
function completionTokens({ tokens: [pieces], logprob: [logprobs] }, completion) {
  const found = [];
  let rest = completion;
  for (let number = pieces.length - 1; number > 0 && rest; number--) {
    const text = pieces[number].replaceAll("\u2581", " ").replaceAll("\u0120", " ").replaceAll("\u010a", "\n");
    if (rest.endsWith(text) && text) {
      found.unshift({ text, logprob: logprobs[number - 1], top: [] });
      rest = rest.slice(0, rest.length - text.length);
    } else if (!/^<.*>$/.test(text)) {
      return null; // a control piece such as </s> has no text; anything else should have matched
    }
  }
  return rest === "" ? found : null;
}

const escaped = (text) => text.replace(/[\x00-\x1f\x7f\\]/g, (character) => ({ "\n": "\\n", "\t": "\\t", "\\": "\\\\" })[character] ?? `\\x${character.charCodeAt(0).toString(16).padStart(2, "0")}`);
const unescaped = (text) => text.replace(/\\(n|t|\\|x[0-9a-fA-F]{2})/g, (_, code) => ({ n: "\n", t: "\t", "\\": "\\" })[code] ?? String.fromCharCode(parseInt(code.slice(1), 16)));
