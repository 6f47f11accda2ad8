/** Small helpers around the document. Text only ever enters it as text: nothing here parses HTML. */

/**
 * An element. `on...` attributes are listeners, `aria-...` ones always say their value; of the others
 * `true` sets a bare attribute, `false` and null none.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) element.setAttribute(name, String(value));
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

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
