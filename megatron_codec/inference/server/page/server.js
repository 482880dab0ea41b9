// What the page knows of the server: how it is, what it makes, and the key that it asks for.
"use strict";
const $ = (id) => document.getElementById(id);
const KEY = "megatron_codec.key";
const DOT = " \u00b7 ";

// What the codec makes, until the server has told.
const model = {
  name: "", known: false, clips: false, side: 256, quality: 25, row: 16, patches: 256, unit: 8,
  largest: 16e6, // bytes of a file that the server takes
};

class Problem extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
  get todo() {
    if (this.status === 0) return "Is it still running? Start it again; this page notices by itself.";
    if (this.status === 401) return "Whoever runs the server knows the key. Try again to enter it.";
    if (this.status === 408) return "Ask for fewer at once, or give more of what is to be completed.";
    if (this.status === 413) return "Choose a smaller file.";
    if (this.status === 429) return "Wait a moment, then try again.";
    if (this.status === 503) return "Try again in a minute. If it stays so, it has to be started again.";
    if (this.status >= 500) return "Try again. The log of the server says more.";
    return this.param ? "Change this and try again." : "";
  }
}

async function call(path, options = {}) {
  for (let refused = false; ; refused = true) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
    let reply;
    try {
      reply = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Problem(0, "The server does not answer.");
    }
    if (reply.ok) return reply;
    if (reply.status === 401 && (await askForKey(key, refused))) continue;
    const { error } = await reply.json().catch(() => ({}));
    throw new Problem(reply.status, error?.message ?? `The server answered ${reply.status}.`, error?.param);
  }
}

let asking = null; // several calls may meet a 401; they ask once

function askForKey(used, refused) {
  if (sessionStorage.getItem(KEY) !== used) return true; // another call has asked meanwhile
  asking ??= new Promise((resolve) => {
    $("ask-why").textContent = (refused || used ? "That key was not accepted. " : "")
      + "It is kept in this tab only, until you close it.";
    $("key").value = "";
    $("ask").returnValue = "";
    $("ask").onclose = () => {
      asking = null;
      const given = $("ask").returnValue === "use";
      if (given) sessionStorage.setItem(KEY, $("key").value);
      resolve(given);
    };
    $("ask").showModal();
  });
  return asking;
}
$("no-key").onclick = () => $("ask").close();

function setState(state, text) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").dataset.state = state;
}

async function describe() {
  const { data } = await (await call("v1/models")).json();
  const { id, codec, max_model_len: context, max_body_bytes: body } = data[0];
  model.largest = body - 8192; // the settings go along with the file
  if (codec?.name === "avc") return describeClips(id, codec.settings, context);
  const side = codec?.settings?.image_size ?? model.side, row = Math.max(1, Math.floor(side / 16));
  // Prompts may end after 8 patches where a row has a multiple of 8, else after each.
  Object.assign(model, { name: id, known: true, side, row, patches: row * row, unit: row % 8 ? 1 : 8 });
  dress(PICTURES, 1, row, row);
  model.quality = codec?.settings?.quality ?? model.quality;
  $("model").textContent = [
    id,
    codec && `${codec.name.toUpperCase()} ${side} \u00d7 ${side}`,
    codec?.settings?.quality && `quality ${codec.settings.quality}`,
    context && `context ${context.toLocaleString("en")}`,
  ].filter(Boolean).join(DOT);
  if (picture) takePicture(picture.file);
}

// Puts the words for what the model makes, and its shape.
function dress(words, aspect, row, rows) {
  model.clips = words === CLIPS;
  for (const [id, text] of Object.entries(words.texts)) $(id).textContent = text;
  $("file").accept = words.accept;
  const shape = { "--aspect": aspect, "--row": row, "--rows": rows };
  for (const [name, value] of Object.entries(shape)) document.documentElement.style.setProperty(name, value);
  draw();
}

// Asks how the server is, for ever. What it serves is asked anew when it has been away; the key only once,
// then again when something is to be made.
async function watch(ask = true) {
  try {
    const reply = await fetch("health", { cache: "no-store" }).catch(() => null);
    if (!reply) throw new Problem(0, "server does not answer");
    if (!reply.ok) throw new Problem(reply.status, (await reply.json()).status);
    if ($("state").dataset.state !== "ready" && (ask || model.known)) await describe();
    if (model.known) setState("ready", "ready");
  } catch (problem) {
    ask &&= problem.status !== 401;
    setState("down", problem.status === 401 ? "needs a key" : problem.message);
  }
  setTimeout(watch, model.known && $("state").dataset.state === "ready" ? 15000 : 3000, ask);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
      if (data.length && data[0].trim() !== "[DONE]") yield JSON.parse(data.join("\n"));
    }
  }
}
