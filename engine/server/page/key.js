// The form for the API key, shown while the server refuses what the page has.

import { call, key } from "./api.js";

const form = document.getElementById("key-form");
const field = document.getElementById("key");
const error = document.getElementById("key-error");

export function askForKey(accepted) {
  key.addEventListener("needed", () => {
    if (!form.hidden) return;
    form.hidden = false;
    field.focus();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    key.value = field.value.trim();
    error.textContent = "";
    try {
      await call("v1/models");
    } catch ({ status, message }) {
      error.textContent = status === 401 ? "The server does not accept this key." : message;
      field.select();
      return;
    }
    form.hidden = true;
    field.value = "";
    accepted();
  });
}
