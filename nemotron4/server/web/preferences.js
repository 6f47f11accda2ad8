/** What one browser remembers between visits, apart from conversations. */

const KEY = "nemotron4.preferences";
const DEFAULTS = { probabilities: false, isListOpen: true, areSettingsOpen: false };

export class Preferences {
  #values = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };

  get(name) {
    return this.#values[name];
  }

  set(name, value) {
    this.#values[name] = value;
    localStorage.setItem(KEY, JSON.stringify(this.#values));
  }
}
