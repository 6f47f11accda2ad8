/** Form controls for the number fields of a request, with the bounds that the server declares. */

import { h } from "./dom.js";
import { problem } from "./schema.js";

const LARGEST_SLIDER = 10; // a wider range is no use on a slider of some hundred pixels

/**
 * One field: a label, a number and, where the range is small, a slider. An empty number leaves the choice to the
 * server.
 * @param {import("./schema.js").Field} field
 * @param {string} text what it starts with
 * @param {(text: string) => void} onChange called with valid texts only
 */
export function numberControl(field, text, onChange) {
  const id = `field-${field.name}`;
  const step = field.isInteger ? 1 : 0.01;
  const bounds = { min: field.min, max: field.max };
  const number = h("input", { id, type: "number", inputmode: "decimal", step: "any", placeholder: field.fallback ?? "default", "aria-describedby": `${id}-note`, ...bounds });
  number.value = text;
  const isBounded = field.min !== undefined && field.max !== undefined && field.max - field.min <= LARGEST_SLIDER;
  const slider = isBounded ? h("input", { type: "range", step, "aria-label": `${field.name}, slider`, ...bounds }) : null;
  if (slider) slider.value = text === "" ? field.fallback : text;
  const note = h("p", { id: `${id}-note`, class: "alert", hidden: true });
  const take = (value) => {
    const wrong = problem(field, value);
    note.hidden = !wrong;
    note.textContent = wrong ?? "";
    number.setAttribute("aria-invalid", String(Boolean(wrong)));
    if (!wrong) onChange(value);
  };
  number.addEventListener("input", () => {
    if (slider && number.value !== "") slider.value = number.value;
    take(number.validity.badInput ? "x" : number.value);
  });
  slider?.addEventListener("input", () => {
    number.value = slider.value;
    take(slider.value);
  });
  return h("div", { class: "field" }, h("label", { for: id }, h("code", {}, field.name), " ", range(field)), number, slider, note);
}

/** The values that a field takes, in short. */
function range(field) {
  // The bounds of 64 bits say nothing to anybody.
  const [min, max] = [field.min, field.max].map((bound) => (Math.abs(bound) > 1e6 ? undefined : bound));
  if (min === undefined && max === undefined) return "";
  const text = max === undefined ? `from ${min}` : min === undefined ? `up to ${max}` : `${min} to ${max}`;
  return h("span", { class: "range" }, text);
}

/** A labelled text area; `hint` stands below it. */
export function textControl(id, label, text, onChange, { rows = 2, hint, placeholder } = {}) {
  const area = h("textarea", { id, rows, placeholder, "aria-describedby": hint ? `${id}-hint` : null });
  area.value = text;
  area.addEventListener("input", () => onChange(area.value));
  return h("div", { class: "field tall" }, h("label", { for: id }, label), area, hint ? h("p", { id: `${id}-hint`, class: "hint" }, hint) : null);
}

/** A JSON schema that the answer has to fit; `onChange` is called with whole ones only. */
export function schemaControl(text, onChange) {
  const note = h("p", { class: "alert", hidden: true });
  const control = textControl("schema", "JSON schema of the answer", text, (now) => {
    const wrong = problemOfSchema(now);
    note.hidden = !wrong;
    note.textContent = wrong ?? "";
    control.querySelector("textarea").setAttribute("aria-invalid", String(Boolean(wrong)));
    if (!wrong) onChange(now);
  }, { rows: 3, placeholder: "Empty: any text" });
  control.append(note);
  return control;
}

function problemOfSchema(text) {
  if (!text.trim()) return null;
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value) ? null : "must be a JSON object";
  } catch (error) {
    return `not JSON: ${error.message}`;
  }
}

export function checkControl(id, label, isOn, onChange, hint) {
  const box = h("input", { id, type: "checkbox" });
  box.checked = isOn;
  box.addEventListener("change", () => onChange(box.checked));
  return h("div", { class: "check" }, box, h("label", { for: id }, label), hint ? h("p", { class: "hint" }, hint) : null);
}

export function selectControl(id, label, options, value, onChange) {
  const select = h("select", { id }, ...options.map(([key, text]) => h("option", { value: key, selected: key === value }, text)));
  select.addEventListener("change", () => onChange(select.value));
  return h("div", { class: "field" }, h("label", { for: id }, label), select);
}

/** Tabs over one panel that the caller redraws. */
export function tabs(names, chosen, onChoose) {
  return names.map(([key, text]) =>
    h("button", { type: "button", role: "tab", "aria-selected": String(key === chosen), tabindex: key === chosen ? "0" : "-1", onclick: () => onChoose(key) }, text));
}

/** Arrow keys between the tabs of a list. */
export function arrowKeys(list) {
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const all = [...list.querySelectorAll("[role=tab]")];
    const next = (all.indexOf(document.activeElement) + step + all.length) % all.length;
    all[next].click();
    list.querySelectorAll("[role=tab]")[next].focus();
  });
}
