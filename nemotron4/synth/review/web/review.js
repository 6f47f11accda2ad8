/** The page: filters and table on the left, one row on the right, everything by keyboard. */

import { getRow, getRows, getRun, putReview } from "./api.js";
import { detail, ownReview, sides } from "./detail.js";
import { announce, at, complain, h } from "./dom.js";

const state = { run: null, rows: [], after: null, row: null, review: null, editing: false };
const filters = () => ({ stage: at("stage").value, state: at("state").value, search: at("search").value });
const annotator = () => at("annotator").value.trim();

async function guarded(work) {
  try {
    await work();
    at("problem").hidden = true;
  } catch (error) {
    complain(error);
  }
}

// ---- the table

async function load({ more = false } = {}) {
  const page = await getRows({ ...filters(), after: more ? state.after ?? "" : "" });
  state.rows = more ? [...state.rows, ...page.rows] : page.rows;
  state.after = page.after;
  at("more").hidden = !page.after;
  at("empty").hidden = state.rows.length > 0;
  at("empty").textContent = page.after ? `Nothing found in ${page.num_scanned.toLocaleString()} rows yet.` : "No row fits.";
  drawTable();
}

function drawTable() {
  at("rows").replaceChildren(...state.rows.map((row) =>
    h("tr", { "aria-current": row.id === state.row?.id, "data-id": row.id },
      h("td", {}, h("button", { type: "button", onclick: () => guarded(() => open(row.id)) }, row.title || row.id.slice(0, 12))),
      h("td", {}, row.task ?? row.kind),
      h("td", { class: "number" }, row.gap == null ? "" : row.gap.toFixed(2)),
      h("td", { class: row.state }, row.state))));
}

async function drawProgress() {
  state.run = await getRun();
  const { reviewed, accepted, rejected, agreement } = state.run;
  const sided = agreement.agree + agreement.disagree;
  at("progress").textContent = [
    `${reviewed} reviewed, ${accepted} accepted, ${rejected} rejected`,
    sided ? `people side with the judge in ${agreement.agree} of ${sided}` : "",
  ].filter(Boolean).join("; ");
}

// ---- one row

async function open(id) {
  state.row = await getRow(id);
  state.editing = false;
  draw();
  drawTable();
  at("detail").scrollTop = 0;
  document.querySelector(`tr[data-id="${id}"]`)?.scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", `#${id}`);
}

function draw() {
  state.review = ownReview(state.row, annotator());
  const view = {
    attributes: state.run.attributes,
    blind: at("blind").checked,
    editing: state.editing,
    change: (part) => guarded(() => change(part)),
    toggleEditing,
  };
  at("detail").replaceChildren(...detail(state.row, state.review, view));
}

/** Saves the whole review with one part changed; what the server has stored is then what is shown. */
async function change(part) {
  if (!annotator()) {
    at("annotator").focus();
    throw new Error("Say who you are first: a review has a name.");
  }
  const { id } = state.row;
  const stored = await putReview(id, { ...state.review, annotator: annotator(), ...part });
  state.row.reviews = [...state.row.reviews.filter((review) => review.annotator !== stored.annotator), stored];
  const listed = state.rows.find((row) => row.id === id);
  const verdicts = state.row.reviews.map((review) => review.verdict);
  if (listed) listed.state = verdicts.includes("reject") ? "rejected" : verdicts.includes("accept") ? "accepted" : "open";
  announce("Saved");
  if (state.row.id === id) draw();
  drawTable();
  await drawProgress();
}

function toggleEditing() {
  state.editing = !state.editing;
  draw();
  if (state.editing) at("detail").querySelector(".answer textarea").focus();
}

async function step(by) {
  const place = state.rows.findIndex((row) => row.id === state.row?.id);
  let next = place < 0 ? 0 : place + by;
  if (next >= state.rows.length && state.after) await load({ more: true });
  next = Math.max(0, Math.min(next, state.rows.length - 1));
  if (state.rows[next]) await open(state.rows[next].id);
}

// ---- keys

const toggled = (field, value) => change({ [field]: state.review[field] === value ? null : value });
const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  a: () => state.row && toggled("verdict", "accept"),
  r: () => state.row && toggled("verdict", "reject"),
  1: () => state.row && sides(state.row)[1] && toggled("preferred", sides(state.row)[0]),
  2: () => state.row && sides(state.row)[1] && toggled("preferred", sides(state.row)[1]),
  0: () => state.row && sides(state.row)[1] && toggled("preferred", "tie"),
  e: () => state.row && toggleEditing(),
  c: () => at("comment")?.focus(),
  "/": () => at("search").focus(),
};

let pending = Promise.resolve();

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=checkbox]), textarea, select");
  if (event.key === "Escape" && isTyping) event.target.blur();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  // One after the other: a mark typed right after "next" is meant for the row that is still coming.
  pending = pending.then(() => guarded(KEYS[event.key]));
});

// ---- the start

function remember(id, event = "change") {
  const field = at(id);
  const name = `review-${id}`;
  if (field.type === "checkbox") field.checked = localStorage.getItem(name) === "true";
  else field.value = localStorage.getItem(name) ?? "";
  field.addEventListener(event, () => {
    localStorage.setItem(name, field.type === "checkbox" ? field.checked : field.value);
    if (state.row) draw();
  });
}

async function start() {
  await drawProgress();
  const { run } = state;
  document.title = `Review: ${run.name}`;
  at("name").textContent = run.name;
  at("stage").append(h("option", { value: "" }, "all stages"), ...run.stages.map((stage) =>
    h("option", { value: stage.name, selected: stage.name === run.first_stage }, `${stage.name} (${stage.rows})`)));
  at("state").append(...run.states.map((each) => h("option", { value: each }, each)));
  remember("annotator");
  remember("blind");
  for (const id of ["stage", "state"]) at(id).addEventListener("change", () => guarded(load));
  let waiting;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => guarded(load), 250);
  });
  at("more").addEventListener("click", () => guarded(() => load({ more: true })));
  await load();
  const linked = location.hash.slice(1);
  if (/^[0-9a-f]{8,}$/.test(linked)) await open(linked);
}

guarded(start);
