// The picture of the cache: a square a block.

export const [FREE, CACHED, SHARED, FIRST_OWNER] = [0, 1, 2, 3]; // engine/snapshot.py's
const HEIGHT = 240; // CSS pixels; only where a block would be smaller than a pixel of the screen is it more
const LARGEST = 16;

/** The states of the blocks from the base64 of 16-bit numbers, the low byte first. */
export function decodeStates(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

/** { free, cached, shared, owned }: how many blocks. */
export function countStates(states) {
  const counts = [0, 0, 0, 0];
  for (const state of states) counts[Math.min(state, FIRST_OWNER)] += 1;
  const [free, cached, shared, owned] = counts;
  return { free, cached, shared, owned };
}

/** The colours of the theme: `states` of FREE, CACHED and SHARED, and `request(id)`, far apart for those that follow. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  const states = ["free", "cached", "shared"].map((name) => style.getPropertyValue(`--${name}`));
  const tone = style.getPropertyValue("--request-tone");
  return { states, request: (id) => `oklch(${tone} ${((id * 137.508) % 360).toFixed(1)})` };
}

/** `owners`: the id of the request of each state from FIRST_OWNER on. → where a point lies: the block, or undefined */
export function drawBlocks(canvas, states, owners, { states: fixed, request }) {
  const ratio = devicePixelRatio;
  const width = Math.max(1, Math.floor(canvas.parentElement.clientWidth * ratio));
  const cell = cellSize(states.length, width, Math.floor(HEIGHT * ratio), Math.floor(LARGEST * ratio));
  const columns = Math.floor(width / cell);
  canvas.width = width; // which clears it
  canvas.height = Math.ceil(states.length / columns) * cell;
  canvas.style.width = `${width / ratio}px`;
  canvas.style.height = `${canvas.height / ratio}px`;
  const colours = [...fixed, ...owners.map(request)];
  const side = cell < 4 * ratio ? cell : cell - Math.round(ratio); // with a gap where there is room for one
  const context = canvas.getContext("2d");
  let shown;
  states.forEach((state, block) => {
    if (state !== shown) context.fillStyle = colours[(shown = state)];
    context.fillRect((block % columns) * cell, Math.floor(block / columns) * cell, side, side);
  });
  return (x, y) => {
    const column = Math.floor((x * ratio) / cell);
    const block = Math.floor((y * ratio) / cell) * columns + column;
    return column < columns && block < states.length ? block : undefined;
  };
}

function cellSize(blocks, width, height, largest) {
  let cell = Math.min(largest, width);
  while (cell > 1 && Math.floor(width / cell) * Math.floor(height / cell) < blocks) cell -= 1;
  return cell;
}
