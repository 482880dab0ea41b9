// Making: from the settings to a run of results, each shown as it comes. Loaded last, it starts the page.
"use strict";
const MAX_RUNS = 20; // kept on the page
const MAX_PARTIALS = 64; // unfinished pictures to ask for, of each
let running = null; // AbortController of the run in progress

function show(problem, todo = problem?.todo) {
  $("problem").hidden = !problem;
  for (const input of $("form").elements) input.removeAttribute("aria-invalid");
  if (!problem) return;
  const upper = (word) => word[0].toUpperCase() + word.slice(1);
  $("what").textContent = problem.message.replace(/^[a-z]+ /, upper);
  $("todo").textContent = todo;
  $("problem").scrollIntoView({ block: "nearest" });
  const field = $("form").elements.namedItem(problem.param ?? "");
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
}

function readSettings() {
  for (const input of $("form").elements) {
    if (input.name && !input.checkValidity()) {
      const label = input.closest("label").firstChild.textContent.trim();
      const problem = new Problem(400, `${label}: ${input.validationMessage}`, input.name);
      show(problem);
      return null;
    }
  }
  const fields = Object.fromEntries(new FormData($("form")));
  const settings = {};
  for (const name of ["n", "temperature", "top_k", "top_p", "min_p"]) settings[name] = Number(fields[name]);
  settings.constrain = fields.constrain === "on";
  if (fields.seed) settings.seed = Number(fields.seed);
  return settings;
}

// The ratio that the server rounds down to so many units.
function ratioOf(units) {
  const all = model.patches / model.unit;
  return Math.floor(all * (units / all)) === units ? units / all : (units + 0.5) / all;
}

function request(settings, given) {
  const fields = { ...settings, stream: true }, path = model.clips ? "v1/videos" : "v1/images";
  const left = model.patches - (given?.patches ?? 0);
  if (!model.clips) fields.partial_images = Math.min(left, MAX_PARTIALS);
  if (!given) {
    const headers = { "content-type": "application/json" };
    return [`${path}/generations`, { method: "POST", headers, body: JSON.stringify(fields) }];
  }
  const body = new FormData();
  if (model.clips) body.set("prompt_frames", given.frames);
  else body.set("prompt_ratio", ratioOf(given.patches / model.unit));
  for (const [name, value] of Object.entries(fields)) body.set(name, value);
  body.set(model.clips ? "video" : "image", given.body, kind().one);
  return [`${path}/edits`, { method: "POST", body }];
}

class Run {
  constructor(settings, given) {
    this.settings = settings;
    this.given = given;
    this.started = performance.now();
    this.element = $("run").content.cloneNode(true).firstElementChild;
    this.part = (name) => this.element.querySelector(name);
    const maker = kind().maker();
    this.tiles = Array.from({ length: settings.n }, (_, i) => new maker(i + 1, given, this.started));
    const { n, temperature, top_k: k, top_p: p, min_p: m, constrain } = settings;
    const things = given ? "completion" : kind().one;
    this.part("h2").textContent = `${n} ${things}${n > 1 ? "s" : ""}${given ? "" : " from nothing"}`;
    this.with = [given?.frames && `${given.frames} of ${model.frames} frames given`,
      `temperature ${temperature}`, k && `top-k ${k}`, p < 1 && `top-p ${p}`, m && `min-p ${m}`,
      constrain === false && "any bytes"];
    this.part(".tiles").classList.toggle("clips", model.clips);
    const least = model.clips ? 13 : 9.25;
    this.part(".tiles").style.setProperty("--tile", `${n === 1 ? 20 : n === 2 ? 17 : least}rem`);
    this.part(".tiles").append(...this.tiles.map((tile) => tile.element));
    this.part(".keep").onclick = () => {
      $("form").elements.seed.value = this.seed;
      say(`Seed ${this.seed} is kept`);
    };
    this.part(".repeat").onclick = () => generate({ ...settings, seed: this.seed }, given);
    this.part(".again").onclick = () => generate({ ...settings, seed: undefined }, given);
    this.part(".all").onclick = async () => {
      for (const tile of this.tiles.filter((tile) => !tile.button.disabled)) {
        tile.download();
        await new Promise((resolve) => setTimeout(resolve, 400)); // browsers drop downloads that come at once
      }
    };
    this.setSeed(settings.seed);
  }

  setSeed(seed) {
    this.seed = seed;
    for (const tile of this.tiles) tile.seed = seed;
    const words = [seed !== undefined && `Seed ${seed}`, ...this.with].filter(Boolean);
    this.part(".with").textContent = words.join(DOT);
  }

  count(...states) { return this.tiles.filter((tile) => states.includes(tile.state)).length; }

  sum(ended = false) {
    const tokens = this.tiles.reduce((sum, tile) => sum + tile.tokens, 0);
    const speed = Math.round((1000 * tokens) / (performance.now() - this.started));
    const n = this.tiles.length, done = n - this.count("running");
    const verdict = ended ? `${this.count("valid")} of ${n} valid` : `${done} of ${n} done`;
    const [all, each] = [tokens, speed].map((number) => number.toLocaleString("en"));
    const words = [verdict, `${all} tokens`, seconds(this.started), `${each} tokens/s`];
    if (ended && this.settings.constrain)
      words.push(`${this.tiles.filter((tile) => tile.alone).length} valid without the grammar`);
    this.part(".summary").textContent = words.join(DOT);
    return ended ? `${verdict}, ${speed} tokens a second` : verdict;
  }

  // Samples, until all pictures are there. Raises Problem.
  async go(signal) {
    const [path, options] = request(this.settings, this.given);
    const reply = await call(path, { ...options, signal });
    for await (const event of events(reply.body)) {
      if (event.error) throw new Problem(event.error.code, event.error.message, event.error.param);
      if (event.type.endsWith(".started")) this.setSeed(event.seed);
      if (event.type.endsWith(".partial_image")) this.tiles[event.index].grow(event);
      if (event.type.endsWith(".progress")) this.tiles[event.index].count(event);
      if (event.type.endsWith(".completed")) {
        this.tiles[event.index].finish(event);
        say(this.sum());
      }
    }
    if (this.count("running")) throw new Problem(0, "The connection to the server broke.");
  }
}

function say(words) { $("live").textContent = words; }

function setRunning(controller) {
  const focused = [$("generate"), $("stop")].includes(document.activeElement);
  running = controller;
  $("generate").hidden = Boolean(running);
  $("stop").hidden = !running;
  for (const button of document.querySelectorAll(".run .actions button")) {
    button.disabled = Boolean(running);
  }
  if (focused) $(running ? "stop" : "generate").focus({ preventScroll: true });
}

async function generate(settings, given) {
  if (running) return;
  show(null);
  const run = new Run(settings, given), controller = new AbortController();
  $("nothing").hidden = true;
  $("results").prepend(run.element);
  const { top } = run.element.getBoundingClientRect();
  const behavior = still() ? "instant" : "smooth";
  if (top < 0 || top > innerHeight / 2) run.element.scrollIntoView({ behavior });
  setRunning(controller);
  say(`Making ${run.part("h2").textContent}`);
  run.sum();
  const ticking = setInterval(() => run.sum(), 200);
  try {
    await run.go(controller.signal);
    setState("ready", "ready");
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Problem)) console.error(error);
    if (error.name === "AbortError") run.tiles.forEach((tile) => tile.end("stopped", "Stopped"));
    else {
      run.tiles.forEach((tile) => tile.end("failed", "Not finished"));
      show(error instanceof Problem ? error : new Problem(0, "The server's answer cannot be read."));
      if (error.status === 0) setState("down", "server does not answer");
    }
  }
  clearInterval(ticking);
  say(run.sum(true));
  const nothing = run.tiles.every((tile) => !tile.bytes);
  if (nothing && run.count("failed")) run.element.remove(); // refused: there is nothing to look at
  for (const old of [...document.querySelectorAll(".run")].slice(MAX_RUNS)) {
    for (const video of old.querySelectorAll("video")) URL.revokeObjectURL(video.src);
    old.remove();
  }
  $("nothing").hidden = Boolean(document.querySelector(".run"));
  setRunning(null);
  run.part(".all").disabled = nothing;
  if (run.seed === undefined) for (const name of [".keep", ".repeat"]) run.part(name).disabled = true;
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  const settings = readSettings();
  if (!settings) return;
  try {
    if (!model.known) await describe();
  } catch (problem) {
    return show(problem);
  }
  generate(settings, clip ? givenClip() : picture && givenPicture());
};
$("stop").onclick = () => running?.abort();

dress(PICTURES, 1, model.row, model.row);
watch();
