/** The image to start from: chosen, dropped or taken from a result, with the mask over it. Knows nothing of requests. */

import { openMask } from "./mask.js";
import { prepareUpload } from "./upload.js";

/** `onProblem(message)` is told what was wrong with a file, null where it was taken. */
export function openInput(form, onProblem) {
  const part = (id) => document.getElementById(id);
  const panel = part("input");
  const shown = part("input-picture");
  const mask = openMask(part("mask"));
  let image = null;
  let taking = Promise.resolve();

  const kind = () => form.elements.kind.value;
  const showKind = () => {
    part("mask-tools").hidden = part("mask").hidden = kind() !== "inpaint";
  };
  const show = () => {
    panel.hidden = !image;
    part("choose-label").textContent = image ? "Choose another image" : "Choose an image";
    showKind();
  };
  const take = async (file) => {
    try {
      const { blob: taken, width, height } = await prepareUpload(file);
      image = taken;
      URL.revokeObjectURL(shown.src);
      shown.src = URL.createObjectURL(taken);
      part("input-frame").style.setProperty("--ratio", width / height);
      part("input-frame").classList.toggle("small", Math.max(width, height) < 256);
      mask.reset(width, height);
      show();
      onProblem(null);
    } catch (error) {
      onProblem(error.message);
    }
  };
  // One after the other, so that the file that was chosen last is the one that stays, however long each takes.
  const set = (file) => (taking = taking.then(() => take(file)));
  const remove = () => {
    image = null;
    URL.revokeObjectURL(shown.src);
    shown.removeAttribute("src");
    show();
  };

  part("img").addEventListener("change", async ({ target }) => {
    if (target.files[0]) await set(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  part("remove-input").addEventListener("click", () => {
    remove();
    part("img").focus();
  });
  for (const radio of form.elements.kind) radio.addEventListener("change", showKind);
  for (const radio of form.elements.brush) radio.addEventListener("change", () => mask.setErasing(form.elements.brush.value === "erase"));
  part("brush-size").addEventListener("input", ({ target }) => mask.setBrush(target.value / 100));
  part("mask-all").addEventListener("click", () => mask.paintRectangle(0, 0, 1, 1));
  part("mask-clear").addEventListener("click", () => mask.clear());
  part("mask-rectangle").addEventListener("click", () => {
    mask.paintRectangle(...["left", "top", "right", "bottom"].map((id) => part(id).value / 100));
  });
  acceptDrops(set);

  return {
    set,
    /** {kind, image, mask}: what is to be sent. "inpaint" without a mask: nothing is painted. */
    async read() {
      await taking;
      if (!image) return { kind: "txt2img", image: null, mask: null };
      if (kind() === "img2img") return { kind: "img2img", image, mask: null };
      return { kind: "inpaint", image, mask: mask.isEmpty() ? null : await mask.toBlob() };
    },
    async write({ kind, image, mask: painted }) {
      await taking;
      if (!image) return remove();
      form.elements.kind.value = kind;
      await set(image);
      if (painted) await mask.load(painted);
    },
  };
}

/** Anywhere on the page: what is dropped beside the field would otherwise be opened in its place. */
function acceptDrops(take) {
  const drop = document.querySelector(".drop");
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  window.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    drop.classList.add("over");
  });
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  window.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
