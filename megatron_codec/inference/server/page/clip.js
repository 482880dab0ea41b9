// Clips: the video that is given, with its frames on a slider, and results that play.
"use strict";

const CLIPS = {
  one: "clip", accept: "video/*,.mkv,.avi,image/gif", maker: () => ClipTile,
  texts: {
    choose: "Choose a video", count: "Clips", title: "Clips, written byte\u00a0by\u00a0byte.",
    hint: "or drop or paste one, and the model goes on from its first frames. Without one, it starts "
      + "from nothing.",
    "about-model": "This model knows no pixels. It writes the bytes of a video's file, one after another, "
      + "as others write words. Give it the first frames of a clip, or nothing at all, and see it "
      + "go\u00a0on.",
  },
};
let clip = null; // {file, url, frames, shown}: what is completed

function describeClips(id, settings, context) {
  const { frames, fps, width, height, qp } = settings;
  Object.assign(model, { name: id, known: true, frames, fps, width, height });
  dress(CLIPS, `${width} / ${height}`, width / 16, height / 16);
  $("model").textContent = [
    id, `AVC ${width} \u00d7 ${height}`, `${frames} frames, ${fps} a second`, `QP ${qp}`,
    `context ${context.toLocaleString("en")}`,
  ].join(DOT);
}

function takeClip(file) {
  if (file.size > model.largest) {
    const mb = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
    const problem = `${file.name || "This"} has ${mb(file.size)}, more than the ${mb(model.largest)} that `
      + "this server takes.";
    return show(new Problem(413, problem));
  }
  show(null);
  if (clip) URL.revokeObjectURL(clip.url);
  const frames = clip?.frames ?? Math.floor((model.frames * 2) / 3);
  clip = { file, url: URL.createObjectURL(file), frames, shown: true };
  $("clip").src = clip.url;
  draw();
}

function drawClip() {
  clip.frames = Math.max(1, Math.min(model.frames - 1, clip.frames));
  Object.assign($("frames"), { max: Math.max(1, model.frames - 1), value: clip.frames });
  $("frames").setAttribute("aria-valuetext", `${clip.frames} of ${model.frames} frames`);
  $("given").textContent = `Given: ${clip.frames} of ${model.frames} frames`;
  $("slider").prepend(strip(document.createElement("div"), clip.frames));
  $("clip").hidden = !clip.shown;
  $("clip").currentTime = (clip.frames - 0.5) / model.fps;
  if (!clip.shown) {
    const textContent = `${clip.file.name}: this browser cannot show it, but the server may read it.`;
    $("stage").append(Object.assign(document.createElement("p"), { className: "no-preview", textContent }));
  }
}
$("frames").oninput = () => {
  clip.frames = Number($("frames").value);
  draw();
};
$("clip").onerror = () => {
  if (!clip) return;
  clip.shown = false;
  draw();
};

// A bar of frames: those that are given, and those that are made.
function strip(element, given) {
  element.className = "strip";
  element.style.cssText = `--frames: ${model.frames}; --given: ${given}`;
  return element;
}

function givenClip() {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: model.width, height: model.height });
  const { videoWidth: width, videoHeight: height, readyState } = $("clip");
  let url = ""; // of the last frame that is given
  if (clip.shown && readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) {
    const scale = Math.min(model.width / width, model.height / height);
    const [w, h] = [width * scale, height * scale];
    canvas.getContext("2d").drawImage($("clip"), (model.width - w) / 2, (model.height - h) / 2, w, h);
    url = canvas.toDataURL("image/jpeg");
  }
  return { body: clip.file, url, frames: clip.frames };
}

class ClipTile extends Tile {
  begin() {
    if (this.given.url) this.media.append(pictureFor(this.given.url, "the last frame that is given"));
    const bar = strip(this.element.querySelector(".strip"), this.given.frames);
    bar.hidden = false;
    bar.role = "img";
    bar.ariaLabel = `Frames 1 to ${this.given.frames} of ${model.frames} are given, the others made`;
  }

  count({ frames, new_tokens: tokens }) {
    if (this.state !== "running") return;
    this.tokens = tokens;
    this.element.querySelector("progress").value = frames / model.frames;
    this.say("running", `${frames} of ${model.frames} frames`, `${tokens} tokens`);
  }

  present({ b64_json: data, share_made_up: share }) {
    if (data) this.play();
    return `${DOT}${(100 * share).toFixed(1)}\u2009% concealed`;
  }

  play() {
    // Not a data: URL: Safari plays none.
    const url = URL.createObjectURL(new Blob([this.bytes], { type: "video/mp4" }));
    const video = Object.assign(document.createElement("video"), {
      loop: true, muted: true, autoplay: !still(), playsInline: true, controls: true,
      ariaLabel: `Clip ${this.number}`, src: url,
    });
    video.onerror = () => {
      const textContent = "This browser cannot play the file.";
      this.media.replaceChildren(Object.assign(document.createElement("p"), { textContent }));
    };
    this.media.replaceChildren(video);
    if (this.given) this.follow(video);
  }

  // Marks the frame that is seen, and says whether it was given.
  follow(video) {
    const bar = this.element.querySelector(".strip"), badge = document.createElement("span");
    badge.className = "badge";
    badge.ariaHidden = "true";
    this.media.append(badge);
    const mark = () => {
      const at = Math.min(model.frames - 1, Math.floor(video.currentTime * model.fps + 0.01));
      bar.style.setProperty("--at", at);
      badge.textContent = at < this.given.frames ? "given" : "generated";
    };
    for (const name of ["loadeddata", "timeupdate", "seeked"]) video.addEventListener(name, mark);
    mark();
  }
}
