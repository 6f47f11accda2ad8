/** The questions of a study as controls: buttons for a few options, a list for many, a field for text. */

import { h } from "./element.js";

const MANY = 8;
const words = (name) => name.replaceAll("_", " ");

/** [value, label, meaning] of each option; one that names an answer has the answer's name on this page. */
export function optionsOf(question, item) {
  const entries = Object.entries(question.options);
  const named = item.answers.filter(({ key }) => key in question.options);
  if (named.length < 2) return entries.map(([name, meaning]) => [name, words(name), meaning]);
  const rest = entries.filter(([name]) => !named.some(({ key }) => key === name));
  return [...named.map(({ key, name }) => [key, name, `${name} is better`]), ...rest.map(([name, meaning]) => [name, words(name), meaning])];
}

/** One question about the item (`answer` null) or about an answer, with my value. */
export function questionFor(question, answer, view) {
  const value = view.mine(answer?.key)[question.name];
  const options = optionsOf(question, view.item);
  const label = answer ? `${answer.name}: ${question.title}` : question.title;
  const say = (given) => view.say({ [question.name]: given }, answer?.key ?? "");
  if (!options.length) {
    return h("div", { class: "question text-question", "data-question": question.name },
      h("textarea", { "aria-label": label, placeholder: question.title, rows: 2, onchange: (event) => say(event.target.value || null) }, value ?? ""));
  }
  const given = (name) => (question.is_scale ? Number(name) : name);
  if (options.length > MANY) {
    return h("div", { class: "question", "data-question": question.name }, h("span", {}, question.title),
      h("select", { "aria-label": label, onchange: (event) => say(event.target.value ? given(event.target.value) : null) },
        h("option", { value: "" }, "–"), ...options.map(([name, shown, meaning]) => h("option", { value: name, selected: String(value) === name }, meaning ? `${shown}: ${meaning}` : shown))));
  }
  const marked = view.isMarked(question, answer);
  return h("div", { class: marked ? "question marked" : "question", "data-question": question.name }, h("span", {}, question.title),
    h("div", { class: question.is_scale ? "scale" : "choice", role: "group", "aria-label": label },
      ...options.map(([name, shown, meaning]) => h("button", {
        type: "button", title: meaning, class: name, "aria-pressed": String(value) === name, "aria-label": `${label} ${shown}${meaning && question.is_scale ? `, ${meaning}` : ""}`,
        onclick: () => say(String(value) === name ? null : given(name)),
      }, shown))));
}

/** The answer's text, as somebody's better one, or to be rewritten. */
export function texts(questions, answer, view) {
  const question = questions.find((each) => each.shows_answer);
  const mine = question && view.mine(answer.key)[question.name];
  const isEdited = Boolean(mine);
  if (!question || !view.editing) return { isEdited, element: h("div", { class: "text" }, mine ?? answer.text) };
  return { isEdited, element: h("textarea", {
    class: "better", "aria-label": `${answer.name}: ${question.title}`,
    onchange: (event) => view.say({ [question.name]: event.target.value === answer.text ? null : event.target.value }, answer.key),
  }, mine ?? answer.text) };
}

/** What other people said of the item, or of one answer. */
export function others(view, key) {
  const found = view.item.judgments.filter((each) => each.annotator !== view.annotator && each.answer === key);
  const said = ({ annotator, values }) => `${annotator}: ${Object.entries(values).map(([name, value]) => `${words(name)} ${typeof value === "string" ? words(value) : value}`).join(", ")}`;
  return found.length ? h("div", { class: "others muted" }, ...found.map((each) => h("p", {}, said(each)))) : "";
}
