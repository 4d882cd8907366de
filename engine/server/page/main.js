// Puts the page together.

import { call } from "./api.js";
import { startChat } from "./chat.js";
import { askForKey } from "./key.js";
import { startView } from "./view.js";

const model = document.getElementById("model");
const engine = document.getElementById("engine");

async function listModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    model.replaceChildren(...data.map(({ id }) => new Option(id, id)));
  } catch {
    // The view asks the same server and says what is wrong.
  }
}

if (matchMedia("(max-width: 52rem)").matches) engine.open = false;
const view = startView();
startChat(() => model.value);
askForKey(() => {
  listModels();
  view.resume();
});
listModels();
