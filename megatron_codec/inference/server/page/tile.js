// One result: what is shown of it while it is made, what is said of it, and its file.
"use strict";

const kind = () => (model.clips ? CLIPS : PICTURES);
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function pictureFor(url, words) {
  const image = Object.assign(document.createElement("img"), { src: url, alt: words });
  image.classList.toggle("pixels", model.side <= 128);
  return image;
}

const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(1)} s`;
const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// Whole patches of a JPEG file: restart markers after the scan's header.
function patchesIn(bytes) {
  let count = 0, scan = false;
  for (let i = 0; i + 1 < bytes.length; i++) {
    if (bytes[i] !== 0xff) continue;
    scan ||= bytes[i + 1] === 0xda;
    if (scan && bytes[i + 1] >= 0xd0 && bytes[i + 1] <= 0xd7) count++;
  }
  return count;
}

class Tile {
  constructor(number, given, started) {
    this.number = number;
    this.given = given;
    this.started = started;
    this.tokens = 0;
    this.turn = this.shown = 0; // of what is shown
    this.element = $("tile").content.cloneNode(true).firstElementChild;
    this.media = this.element.querySelector(".media");
    this.element.querySelector("progress").ariaLabel = `Progress of ${kind().one} ${number}`;
    this.button = this.element.querySelector(".download");
    this.button.ariaLabel = `Download ${kind().one} ${number}`;
    this.button.onclick = () => this.download();
    if (given) this.begin();
  }

  begin() {
    this.show(this.given.url, this.given.patches, "the part that is given");
    this.media.insertAdjacentHTML("beforeend", cut(this.given.patches));
  }

  get state() { return this.element.dataset.state; }

  say(state, verdict, facts = "") {
    this.element.dataset.state = state;
    this.element.querySelector(".verdict").textContent = verdict;
    this.element.querySelector(".facts").textContent = facts;
    this.element.querySelector("progress").hidden = state !== "running";
  }

  async show(url, patches, words) {
    const turn = ++this.turn;
    this.element.querySelector("progress").value = patches / model.patches;
    let next = pictureFor(url, `Picture ${this.number}, ${words}`);
    if (patches < model.patches) next.style.clipPath = clipPath(patches);
    try {
      await next.decode(); // so that nothing flickers
    } catch {
      if (!next.naturalWidth) {
        const textContent = "A browser cannot show this file.";
        next = Object.assign(document.createElement("p"), { textContent });
      }
    }
    if (turn < this.shown) return;
    this.shown = turn;
    this.media.querySelector("img, p")?.remove();
    this.media.prepend(next);
  }

  grow({ b64_json: data, new_tokens: tokens, output_format: format }) {
    if (this.state !== "running") return;
    this.tokens = tokens;
    this.keep(data, format);
    const patches = patchesIn(this.bytes);
    this.show(`data:image/${format};base64,${data}`, patches, "unfinished");
    const percent = Math.floor((100 * patches) / model.patches);
    this.say("running", `${percent}\u2009%`, `${tokens} tokens`);
  }

  // What of a finished file is shown, and what is said of it.
  present({ b64_json: data, output_format: format, valid, removed, redrawn }) {
    const words = valid ? "finished" : "not valid";
    if (data) this.show(`data:image/${format};base64,${data}`, model.patches, words);
    return redrawn ? `${DOT}${redrawn} redrawn (${(100 * removed).toFixed(1)}\u2009% refused)` : "";
  }

  finish(event) {
    const { b64_json: data, new_tokens: tokens, output_format: format, valid, redrawn, reason, seed } = event;
    this.tokens = tokens;
    this.alone = valid && redrawn === 0;
    this.seed = seed;
    if (data) this.keep(data, format);
    else this.media.insertAdjacentHTML("beforeend", "<p>The bytes do not even begin like a file.</p>");
    const facts = `${tokens} tokens${DOT}${seconds(this.started)}${this.present(event)}`;
    this.say(valid ? "valid" : "invalid", valid ? "Valid file" : `Not valid: ${reason}`, facts);
    this.button.disabled = !data;
  }

  end(state, verdict) {
    if (this.state !== "running") return;
    this.say(state, verdict, `${this.tokens} tokens${DOT}${seconds(this.started)}`);
    this.button.disabled = !this.bytes;
  }

  keep(data, format) {
    this.bytes = bytesOf(data);
    this.suffix = format === "jpeg" ? "jpg" : format;
  }

  download() {
    const name = `${model.name || kind().one}-${this.seed}-${this.number}.${this.suffix}`;
    const url = URL.createObjectURL(new Blob([this.bytes]));
    Object.assign(document.createElement("a"), { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }
}
