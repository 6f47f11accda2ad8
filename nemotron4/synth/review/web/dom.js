/** Small helpers around the document. Text only ever enters it as text: nothing here parses HTML. */

export { h } from "./element.js";

export const at = (id) => document.getElementById(id);

/** Says something to screen readers, and nobody else. */
export const announce = (text) => { at("status").textContent = text; };

let hiding;
/** Shows what went wrong, with what to do about it, until the next thing goes right. */
export function complain(error) {
  at("problem").textContent = error.message;
  at("problem").hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { at("problem").hidden = true; }, 15_000);
}
