// The conversation: exchanges of a question and an answer.

import { streamAnswer } from "./answer.js";

const byId = (id) => document.getElementById(id);
const [list, said, composer, question] = ["exchanges", "said", "composer", "question"].map(byId);
const [send, stop, regenerate, clear] = ["send", "stop", "regenerate", "clear"].map(byId);
const REASONS = { length: "cut at the limit of tokens", stop: "", abort: "ended by the server" };

/** model() is the name of the model to ask. */
export function startChat(model) {
  const exchanges = [];
  let running = null; // the AbortController of the answer that comes

  async function ask(exchange) {
    const controller = (running = new AbortController());
    exchange.begin();
    showButtons();
    try {
      const body = { model: model() || undefined, messages: messages(exchanges), ...settings() };
      await streamAnswer(body, controller.signal, (text, facts) => exchange.add(text, facts));
      exchange.end();
    } catch (error) {
      exchange.end(error);
    }
    if (running !== controller) return; // cleared meanwhile
    said.textContent = exchange.outcome;
    running = null;
    showButtons();
  }

  function showButtons() {
    send.disabled = running !== null;
    stop.disabled = running === null;
    clear.disabled = exchanges.length === 0;
    regenerate.disabled = running !== null || exchanges.length === 0;
  }

  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !question.value.trim()) return;
    const exchange = new Exchange(question.value);
    question.value = "";
    exchanges.push(exchange);
    ask(exchange);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    composer.requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
  regenerate.addEventListener("click", () => ask(exchanges.at(-1)));
  clear.addEventListener("click", () => {
    running?.abort();
    running = null;
    exchanges.length = 0;
    list.replaceChildren();
    showButtons();
    question.focus();
  });
}

/** What is sent: questions that were answered, if only in part, their answers, and the last question. */
function messages(exchanges) {
  const sent = byId("system").value.trim() ? [{ role: "system", content: byId("system").value }] : [];
  for (const { question, answer } of exchanges.slice(0, -1)) {
    if (answer) sent.push({ role: "user", content: question }, { role: "assistant", content: answer });
  }
  return [...sent, { role: "user", content: exchanges.at(-1).question }];
}

function settings() {
  return { temperature: number("temperature"), max_tokens: number("max-tokens") };
}

/** A field's number, nothing where it is empty; the server says what is out of bounds. */
function number(id) {
  const field = byId(id);
  if (field.validity.badInput) throw new Error(`${field.labels[0].textContent.trim()} must be a number.`);
  return field.value === "" ? undefined : field.valueAsNumber;
}

class Exchange {
  #text = document.createTextNode("");
  #unshown = "";
  #facts = {};
  #ending = "";
  #node = document.createElement("article");
  #answer = element("p", "answer");
  #footer = element("p", "facts");
  #error = element("p", "error");

  constructor(question) {
    this.question = question;
    this.#answer.append(this.#text); // text, whatever it looks like
    this.#error.setAttribute("role", "alert");
    this.#node.append(element("p", "question", question), this.#answer, this.#error, this.#footer);
    list.append(this.#node);
  }

  begin() {
    this.answer = this.#text.data = this.#unshown = this.#ending = this.outcome = "";
    this.#error.textContent = this.#footer.textContent = "";
    this.#facts = {};
    this.#node.setAttribute("aria-busy", "true");
    this.#node.scrollIntoView({ block: "end" });
  }

  /** Shown with the next frame: many tokens may come in one. */
  add(text, facts) {
    if (!this.#unshown && text) requestAnimationFrame(() => this.#show());
    this.answer += text;
    this.#unshown += text;
    this.#facts = facts;
  }

  end(error) {
    const stopped = error?.name === "AbortError";
    this.#ending = stopped ? "stopped" : REASONS[this.#facts.reason];
    this.#show();
    this.#node.removeAttribute("aria-busy");
    if (error && !stopped) this.#error.textContent = error.message;
    this.outcome = this.#error.textContent || (stopped ? "Stopped." : this.answer);
    this.#node.scrollIntoView({ block: "end" });
  }

  #show() {
    const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 40; // a reader who scrolled up stays there
    this.#text.appendData(this.#unshown);
    this.#unshown = "";
    this.#footer.textContent = [describe(this.#facts), this.#ending].filter(Boolean).join(" · ");
    if (follows) list.scrollTop = list.scrollHeight;
  }
}

function describe({ tokens, firstToken, perSecond }) {
  if (!tokens) return "";
  const facts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (firstToken != null) facts.push(`first after ${firstToken.toFixed(2)} s`);
  if (perSecond != null) facts.push(`${perSecond.toFixed(1)} tokens/s`);
  return facts.join(" · ");
}

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}
