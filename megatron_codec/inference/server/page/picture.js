// The stage: the picture that is given, and the line under what the model gets of it.
"use strict";
const TAKEN = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];
let picture = null; // {file, body, url, units}: what is completed

const PICTURES = {
  one: "picture", accept: "image/*", maker: () => Tile,
  texts: {
    choose: "Choose a picture", count: "Pictures", title: "Pictures, written byte\u00a0by\u00a0byte.",
    hint: "or drop or paste one, and the model completes it. Without one, it starts from nothing.",
    "about-model": "This model knows no pixels. It writes the bytes of a picture's file, one after another, "
      + "as others write words. Give it the upper part of a picture, or nothing at all, and watch it "
      + "go\u00a0on.",
  },
};

// The first patches of a picture as the share of a square: for clip-path, and as the line below them.
function corner(patches) {
  const whole = Math.floor(patches / model.row), rest = patches % model.row;
  return [whole, rest, whole + (rest ? 1 : 0)].map((count) => (100 * count) / model.row);
}
function clipPath(patches) {
  const [upper, x, lower] = corner(patches);
  return `polygon(0 0, 100% 0, 100% ${upper}%, ${x}% ${upper}%, ${x}% ${lower}%, 0 ${lower}%)`;
}
function cut(patches) {
  const [upper, x, lower] = corner(patches);
  const d = `M0 ${lower}H${x}V${upper}H100`;
  return `<svg class="cut" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">
    <path d="${d}"/><path d="${d}"/></svg>`;
}

async function take(file) {
  try { // a picture can be looked at before the server has told what it makes
    if (!model.known && file.type.startsWith("video/")) await describe();
  } catch (problem) {
    return show(problem);
  }
  return model.clips ? takeClip(file) : takePicture(file);
}

async function takePicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    const problem = new Problem(400, `${file.name || "This"} cannot be read as a picture.`);
    return show(problem, "Choose a JPEG, PNG, WebP, GIF or BMP file.");
  }
  show(null);
  const square = Math.min(bitmap.width, bitmap.height), size = model.side;
  const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = "high";
  const left = (bitmap.width - square) / 2, top = (bitmap.height - square) / 2;
  context.drawImage(bitmap, left, top, square, square, 0, 0, size, size);
  const png = () => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  // The file itself, if the server reads its kind; the square, if not, or if it is large.
  const small = file.size <= Math.min(8e6, model.largest) && bitmap.width * bitmap.height < 4e7;
  const fits = TAKEN.includes(file.type) && small;
  const units = picture?.units ?? Math.floor(model.patches / model.unit / 2);
  picture = { file, body: fits ? file : await png(), units };
  picture.url = canvas.toDataURL("image/jpeg", model.quality / 100); // as the codec sees it
  for (const id of ["below", "above"]) {
    $(id).src = picture.url;
    $(id).classList.toggle("pixels", size <= 128);
  }
  draw();
}

function draw() {
  if (model.clips) picture = null;
  else clip = null;
  const has = Boolean(picture ?? clip);
  $("stage").classList.toggle("empty", !has);
  $("about").hidden = !has;
  for (const id of ["below", "above", "line"]) $(id).hidden = !picture;
  for (const id of ["clip", "slider"]) $(id).hidden = !clip;
  for (const id of ["chooser", "hint"]) $(id).hidden = has;
  $("stage").querySelectorAll(".cut, .strip, .no-preview").forEach((element) => element.remove());
  $("generate").textContent = has ? `Complete the ${kind().one}` : "Generate from nothing";
  if (clip) drawClip();
  if (!picture) return;
  const most = Math.max(0, model.patches / model.unit - 1);
  picture.units = Math.min(most, Math.max(Math.min(1, most), picture.units));
  const patches = picture.units * model.unit, percent = Math.round((100 * patches) / model.patches);
  $("above").style.clipPath = clipPath(patches);
  $("line").insertAdjacentHTML("beforebegin", cut(patches));
  $("line").style.top = `${(100 * patches) / model.patches}%`;
  const words = `${patches} of ${model.patches} patches`;
  for (const [name, value] of Object.entries({ min: 1, max: most, now: picture.units })) {
    $("line").setAttribute(`aria-value${name}`, value);
  }
  $("line").setAttribute("aria-valuetext", `${words}, ${percent} percent`);
  $("given").textContent = `Given: ${words}, ${percent}\u2009%`;
}

function moveLine(units) {
  picture.units = units;
  draw();
}

$("line").onkeydown = (event) => {
  const row = Math.max(1, model.row / model.unit), most = model.patches / model.unit, now = picture.units;
  const target = {
    ArrowLeft: now - 1, ArrowRight: now + 1, ArrowUp: now - row, ArrowDown: now + row,
    PageUp: now - Math.ceil(most / 8), PageDown: now + Math.ceil(most / 8), Home: 0, End: most,
  }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  moveLine(target);
};
$("stage").onpointerdown = (event) => {
  // A finger beside the line scrolls the page.
  if (!picture || event.button || (event.pointerType === "touch" && event.target !== $("line"))) return;
  event.preventDefault();
  $("line").focus({ preventScroll: true });
  $("stage").setPointerCapture(event.pointerId);
  const follow = ({ clientY }) => {
    const box = $("stage").getBoundingClientRect();
    moveLine(Math.round(((clientY - box.top) / box.height) * (model.patches / model.unit)));
  };
  $("stage").onpointermove = follow;
  $("stage").onpointerup = $("stage").onpointercancel = () => ($("stage").onpointermove = null);
  follow(event);
};
$("file").onchange = async () => {
  const [file] = $("file").files;
  if (file) await take(file);
  if (picture) $("line").focus();
  if (clip) $("frames").focus();
  $("file").value = "";
};
$("remove").onclick = () => {
  picture = clip = null;
  draw();
  $("file").focus();
};
const isFiles = (event) => event.dataTransfer?.types.includes("Files");
document.ondragover = (event) => {
  if (!isFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
};
document.ondragleave = (event) => event.relatedTarget ?? document.body.classList.remove("dropping");
document.ondrop = (event) => {
  if (!isFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
};
document.onpaste = (event) => {
  const [file] = event.clipboardData.files;
  if (file) take(file);
};

// A copy: the line may be moved, and the picture replaced, while this one is being completed.
const givenPicture = () => ({ body: picture.body, url: picture.url, patches: picture.units * model.unit });
