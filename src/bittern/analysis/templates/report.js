"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const all = (query) => [...document.querySelectorAll(query)];

// ---- tooltips: what a cell or point is, under the pointer
const tip = byId("tip");
function showTip(text, x, y) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, y + 16 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 16) + "px";
}
document.addEventListener("pointermove", (event) => {
  const target = event.target.closest("[data-tip]");
  if (target) showTip(target.dataset.tip, event.clientX, event.clientY);
  else if (!event.target.closest("canvas")) showTip("");
});

// ---- one layer and head is chosen; every plot and the maps show it
const chosen = { sample: 0, layer: 0, head: 0, query: 0 };
function choose(changes) {
  Object.assign(chosen, changes);
  for (const mark of all("svg [data-layer]")) {
    const sameHead = mark.dataset.head === undefined || +mark.dataset.head === chosen.head;
    mark.classList.toggle("on", +mark.dataset.layer === chosen.layer && sameHead);
  }
  const cells = all("svg[data-heat] .on");
  const found = cells.map((cell) => cell.closest("figure").querySelector("h3").textContent + " " + cell.dataset.tip.split(" ").pop());
  byId("readout").textContent = `${data.labels[chosen.layer]}, head ${chosen.head}: ${found.join(" · ")}`;
  for (const name of ["sample", "layer", "head", "query"]) if (byId(name)) byId(name).value = chosen[name];
  draw();
}
document.addEventListener("click", (event) => {
  const cell = event.target.closest("svg [data-layer]");
  if (cell) choose({ layer: +cell.dataset.layer, head: cell.dataset.head === undefined ? chosen.head : +cell.dataset.head });
});
for (const svg of all("svg[data-heat]")) {
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [layer, head] = [chosen.layer + step[0], chosen.head + step[1]];
    const cell = svg.querySelector(`[data-layer="${layer}"][data-head="${head}"]`);
    if (cell) choose({ layer, head });
  });
}

// ---- attention maps of a sample, teacher and students side by side
const CIVIDIS = data.cividis.map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), i = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return `rgb(${CIVIDIS[i].map((low, k) => Math.round(low + (CIVIDIS[i + 1][k] - low) * (at - i)))})`;
}
const decoded = new Map();
function codes(text) {
  if (!decoded.has(text)) decoded.set(text, Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  return decoded.get(text);
}
// Probabilities of the chosen layer and head, of one model: queries × keys.
function mapOf(sample, model) {
  const [, heads, queries, keys] = sample.shape, size = queries * keys;
  const start = (chosen.layer * heads + chosen.head) * size;
  return Array.from(codes(sample.maps[model]).subarray(start, start + size), (code) => (code / 255) ** 2);
}
function draw() {
  const place = byId("maps");
  if (!place) return;
  const sample = data.shown[chosen.sample];
  byId("said").textContent = [sample.text, sample.predictions.map((p, i) => `${data.names[i]}: ${p}`).join(", ")].filter(Boolean).join(" — ");
  const maps = data.names.map((_, model) => mapOf(sample, model));
  const [, , , keys] = sample.shape;
  const top = Math.max(1e-9, ...(sample.image ? maps.map((m) => Math.max(...m.slice(chosen.query * keys, (chosen.query + 1) * keys)))
    : maps.map((m) => Math.max(...m))));
  const parts = maps.map((map, model) => {
    const box = document.createElement("div"), title = document.createElement("h3"), canvas = document.createElement("canvas");
    title.textContent = data.names[model];
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `attention of ${data.names[model]}, ${data.labels[chosen.layer]}, head ${chosen.head}`);
    box.append(title, canvas);
    if (sample.image) drawGrid(canvas, sample, map.slice(chosen.query * keys, (chosen.query + 1) * keys), top);
    else drawTokens(canvas, sample, map, top);
    return box;
  });
  place.classList.toggle("grids", Boolean(sample.image));
  if (sample.image) {
    const box = document.createElement("div"), title = document.createElement("h3"), image = new Image();
    title.textContent = "image";
    image.src = sample.image;
    image.alt = "the sample";
    box.append(title, image);
    parts.unshift(box);
  }
  place.replaceChildren(...parts);
}
function prepare(canvas, width, height) {
  const scale = 2, context = canvas.getContext("2d");
  canvas.width = width * scale;
  canvas.height = height * scale;
  context.scale(scale, scale);
  return context;
}
function drawGrid(canvas, sample, map, top) {
  const [rows, columns] = sample.grid, cell = 420 / Math.max(rows, columns);
  const context = prepare(canvas, columns * cell, rows * cell);
  map.forEach((p, i) => {
    context.fillStyle = colour(p / top);
    context.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell + 0.5, cell + 0.5);
  });
  hover(canvas, columns * cell, (x, y) => {
    const i = Math.floor(y / cell) * columns + Math.floor(x / cell);
    return map[i] === undefined ? "" : `row ${Math.floor(y / cell)}, column ${Math.floor(x / cell)}: ${map[i].toFixed(4)}`;
  });
}
// As wide as it is shown, so that letters keep their size: on a phone every second or third token has a name.
function drawTokens(canvas, sample, map, top) {
  const n = sample.tokens.length, size = 12, all = byId("maps").clientWidth, gap = 16;
  const beside = Math.min(data.names.length, Math.max(1, Math.floor((all + gap) / (300 + gap))));
  const side = Math.min(560, (all - gap * (beside - 1)) / beside), room = 84, cell = Math.min(30, (side - room - 4) / n);
  const context = prepare(canvas, side, room + n * cell + 4), step = Math.ceil((size + 1) / cell);
  context.fillStyle = getComputedStyle(document.body).color;
  context.font = `${size}px system-ui, Helvetica, Arial, sans-serif`;
  sample.tokens.forEach((token, i) => {
    if (i % step) return;
    const label = token.length > 10 ? token.slice(0, 9) + "…" : token, at = room + (i + 0.5) * cell;
    context.textAlign = "right";
    context.fillText(label, room - 5, at + 4);
    context.save();
    context.translate(at + 4, room - 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(label, 0, 0);
    context.restore();
  });
  map.forEach((p, i) => {
    context.fillStyle = colour(Math.sqrt(p / top));
    context.fillRect(room + (i % n) * cell, room + Math.floor(i / n) * cell, cell - 0.5, cell - 0.5);
  });
  hover(canvas, side, (x, y) => {
    const [key, query] = [x, y].map((v) => Math.floor((v - room) / cell));
    return key < 0 || query < 0 || key >= n || query >= n ? "" : `${sample.tokens[query]} → ${sample.tokens[key]}: ${map[query * n + key].toFixed(4)}`;
  });
}
function hover(canvas, width, what) {
  canvas.onpointermove = (event) => {
    const box = canvas.getBoundingClientRect(), scale = width / box.width;
    showTip(what((event.clientX - box.left) * scale, (event.clientY - box.top) * scale), event.clientX, event.clientY);
  };
  canvas.onpointerleave = () => showTip("");
}
for (const name of ["sample", "layer", "head", "query"]) {
  byId(name)?.addEventListener("change", (event) => choose({ [name]: +event.target.value }));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);

// ---- plots as files, in the colours of paper
function asSvg(svg) {
  const copy = svg.cloneNode(true);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  for (const mark of copy.querySelectorAll(".on")) mark.removeAttribute("class");
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.setAttribute("font-family", "Helvetica, Arial, sans-serif");
  return [new XMLSerializer().serializeToString(copy).replace(/var\(--(\w+)\)/g, (_, name) => data.colours[name]), width, height];
}
function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-save]");
  if (!button) return;
  const figure = button.closest("figure"), [text, width, height] = asSvg(figure.querySelector("svg")), name = figure.id;
  const blob = new Blob([text], { type: "image/svg+xml" });
  if (button.dataset.save === "svg") return download(blob, `${name}.svg`);
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas"), scale = 3;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((png) => download(png, `${name}.png`));
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
});
choose(data.first);
