// The engine as it runs, asked for while the page is visible.

import { call } from "./api.js";
import { CACHED, countStates, decodeStates, drawBlocks, FIRST_OWNER, FREE, palette, SHARED } from "./blocks.js";

const PERIOD = 500; // milliseconds from an answer to the next question
const AFTER_ERROR = 2000;
const WINDOW = 2; // seconds that rates are taken over
const ROWS = 16;

const byId = (id) => document.getElementById(id);
const [canvas, pointed] = ["blocks", "pointed"].map(byId);

/** → { resume }, to be called when a key has been given. */
export function startView() {
  let asking = false;
  let timer;
  let samples = [];
  let shown; // the last view with its states

  async function poll() {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = true;
    let delay = PERIOD;
    try {
      const view = await (await call("view")).json();
      samples = recent(samples, view);
      shown = { view, states: decodeStates(view.blocks) };
      showFigures(view, generationRate(samples));
      showRequests(view);
      draw();
      byId("view-error").textContent = "";
    } catch ({ status, message }) {
      byId("view-error").textContent = message;
      byId("brief").textContent = "not known";
      samples = [];
      delay = status === 401 ? null : AFTER_ERROR; // a key comes with `resume`
    }
    asking = false;
    if (delay !== null) timer = setTimeout(poll, delay);
  }

  function draw() {
    if (!shown || !canvas.parentElement.clientWidth) return; // nothing is known yet, or it is folded away
    const { view, states } = shown;
    const colours = palette();
    shown.blockAt = drawBlocks(canvas, states, view.running.map(({ id }) => id), colours);
    showLegend(states, view, colours);
    for (const swatch of document.querySelectorAll("[data-request]")) {
      swatch.style.background = colours.request(Number(swatch.dataset.request));
    }
  }

  canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
    const block = shown?.blockAt(offsetX, offsetY);
    pointed.textContent = block === undefined ? "" : `Block ${block}: ${owner(shown.states[block], shown.view)}`;
  });
  canvas.addEventListener("pointerleave", () => (pointed.textContent = ""));
  new ResizeObserver(draw).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.addEventListener("visibilitychange", () => {
    samples = [];
    poll();
  });
  poll();
  return { resume: poll };
}

/** The samples of the last WINDOW seconds and one before them; none of another engine's. */
function recent(samples, view) {
  const kept = samples.filter(({ steps, clock }) => steps <= view.steps && clock < view.clock);
  while (kept.length > 1 && view.clock - kept[1].clock >= WINDOW) kept.shift();
  return [...kept, view];
}

/** Tokens a second. */
function generationRate(samples) {
  const [first, last] = [samples[0], samples.at(-1)];
  return samples.length > 1 ? (last.generated_tokens - first.generated_tokens) / (last.clock - first.clock) : 0;
}

function showFigures(view, rate) {
  const figures = {
    Running: view.running.length,
    Waiting: view.num_waiting,
    "Tokens/s": rate.toFixed(1),
    Steps: view.steps.toLocaleString("en"),
    "Prefix hits": percent(view.cached_prompt_tokens, view.prompt_tokens),
    Preemptions: view.preemptions,
  };
  byId("figures").replaceChildren(...Object.entries(figures).map(([name, value]) => figure(name, value)));
  const { Running, Waiting, "Tokens/s": speed } = figures;
  byId("brief").textContent = `${Running} running, ${Waiting} waiting, ${speed} tokens/s`;
}

function showRequests(view) {
  const requests = [...view.running, ...view.waiting];
  byId("requests").replaceChildren(...requests.slice(0, ROWS).map(row));
  const more = view.running.length + view.num_waiting - Math.min(requests.length, ROWS);
  byId("more").textContent = more ? `and ${more} more` : requests.length ? "" : "None.";
}

function showLegend(states, view, colours) {
  const { free, cached, shared, owned } = countStates(states);
  const entries = [
    [`${free} free`, colours.states[FREE]],
    [`${cached} cached and unused`, colours.states[CACHED]],
    [`${shared} shared`, colours.states[SHARED]],
    [`${owned} of one request`, null],
  ];
  byId("legend").replaceChildren(
    ...entries.map(([text, colour]) => {
      const swatch = node("span", "", colour ? "swatch" : "swatch many");
      if (colour) swatch.style.background = colour;
      const entry = node("li", "");
      entry.append(swatch, text);
      return entry;
    }),
  );
  const texts = entries.map(([text]) => text).join(", ");
  canvas.setAttribute("aria-label", `${states.length} cache blocks of ${view.block_size} tokens: ${texts}`);
}

function owner(state, view) {
  if (state >= FIRST_OWNER) return `request ${view.running[state - FIRST_OWNER].id}`;
  return ["free", "cached and unused", "shared by requests"][state];
}

function figure(name, value) {
  const pair = document.createElement("div");
  pair.append(node("dt", name), node("dd", value));
  return pair;
}

function row(request) {
  const name = node("th", "");
  name.scope = "row";
  const swatch = node("span", "", "swatch");
  if (request.state !== "waiting") swatch.dataset.request = request.id;
  name.append(swatch, request.id);
  const line = document.createElement("tr");
  const cells = [request.state, request.prompt_tokens, request.generated_tokens, request.blocks];
  line.append(name, ...cells.map((text) => node("td", text)));
  return line;
}

function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(0)} %` : "–";
}

function node(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}
