/** The page: connects the form, the requests, the results and the history. */

import { Unreachable } from "./connection.js";
import { applyCapabilities, capitalised, clearProblems, notNumbers, readSettings, showProblems, writeSettings } from "./form.js";
import { openHistory } from "./history.js";
import { openInput } from "./input.js";
import { openLoras } from "./loras.js";
import { element, inWords, openCard } from "./results.js";
import { blobOf, generate, readCapabilities, Refused } from "./service.js";

const MORE_FIELDS = ["prompt_syntax", "clip_skip"]; // below "More settings"
const TEXT_FIELDS = ["prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "scheduler", "seed", ...MORE_FIELDS];
const PREVIEWS = 20; // of an image
const GENERATED_AT_ONCE = 4; // a browser has six connections to a server, and each image keeps one
const ANNOUNCE_EVERY_MS = 5000; // a screen reader would otherwise speak without end
const ONE_COLUMN = "(max-width: 55rem)"; // the results are below the form, as style.css has it

const part = (id) => document.getElementById(id);
const form = part("form");
const input = openInput(form, showInputProblem);
const loras = openLoras();
const past = await openHistory();
const inProgress = new Set(); // an AbortController for each image
let isBusy = false;
let seedLimit = 2 ** 32;
let cards = [];

form.addEventListener("submit", (event) => {
  event.preventDefault();
  startGenerating();
});
part("cancel").addEventListener("click", cancelAll);
document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.repeat) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) startGenerating();
  else if (event.key === "Escape") cancelAll();
});
form.elements.strength.addEventListener("input", showStrength);
part("clear-history").addEventListener("click", async () => {
  if (!confirm("Delete all images that are kept in this browser?")) return;
  await past.clear();
  listHistory();
  part("prompt").focus();
});

listHistory();
await readLimits();
showStrength();
part("draw").disabled = false;

async function readLimits() {
  try {
    const capabilities = await readCapabilities();
    applyCapabilities(form, capabilities);
    loras.offer(capabilities);
    seedLimit = capabilities.fields.seed.exclusiveMaximum;
  } catch (error) {
    alertTo(`The limits and the noise schedulers could not be read from the server (/capabilities: ${error.message}). Reload the page to try again.`);
  }
}

async function startGenerating() {
  if (isBusy) return;
  isBusy = true;
  try {
    await generateFromForm();
  } finally {
    isBusy = false;
  }
}

async function generateFromForm() {
  clearProblems(form);
  alertTo("");
  const start = await input.read();
  const settings = readSettings(form, start.image ? [...TEXT_FIELDS, "strength"] : TEXT_FIELDS);
  const chosen = loras.read();
  if (chosen.length) settings.loras = chosen;
  const problems = [...notNumbers(form), ...loras.problems()];
  const count = Number(part("count").value);
  if (!(count >= 1 && count <= part("count").max)) problems.push({ field: "count", message: `Must be from 1 to ${part("count").max}.` });
  if (start.kind === "inpaint" && !start.mask) problems.push({ field: "mask", message: "Nothing is painted yet. Paint over the part to repaint." });
  if (problems.length) tell(problems, "");
  else await generateAll(settings, start, count);
}

/** Each image is a request of its own with the next seed; the server batches them. */
async function generateAll(settings, start, count) {
  const firstSeed = settings.seed ?? crypto.getRandomValues(new Uint32Array(1))[0] % seedLimit;
  const before = cards;
  cards = [];
  const requests = Array.from({ length: count }, (_, index) => {
    const seed = index ? (firstSeed + index) % seedLimit : firstSeed; // the first as it is, for the server to judge
    return { ...settings, seed, preview_every_steps: previewEverySteps(settings.num_inference_steps) };
  });
  const turns = requests.map((request) => prepareImage(request, start));
  showCards();
  showGenerating(true);
  announce("Generating.", true);
  const outcomes = await inTurns(turns, GENERATED_AT_ONCE);
  showGenerating(false);
  const done = outcomes.filter((outcome) => outcome === "done").length;
  const refused = outcomes.find((outcome) => outcome instanceof Error);
  replaceCards(before, refused && !done ? before : cards);
  if (refused) showError(refused);
  else announce(done === 0 ? "Cancelled." : done === 1 ? "The image is ready." : `${done} images are ready.`, true);
}

function previewEverySteps(steps) {
  const { defaultValue, max } = form.elements.num_inference_steps;
  return Math.max(1, Math.round(Math.min(steps ?? defaultValue, max) / PREVIEWS)); // too many steps are to be one problem, not two
}

/** Calls all `turns`, `atOnce` of them at a time. Returns their outcomes in order. */
async function inTurns(turns, atOnce) {
  const outcomes = [];
  const waiting = [...turns.entries()];
  const takeTurns = async () => {
    while (waiting.length) {
      const [index, turn] = waiting.shift();
      outcomes[index] = await turn();
    }
  };
  await Promise.all(Array.from({ length: atOnce }, takeTurns));
  return outcomes;
}

/** A card that can be cancelled at once. Returns what generates its image. */
function prepareImage(request, start) {
  const controller = new AbortController();
  const ratio = request.width && request.height ? request.width / request.height : start.image ? inputRatio() : 1;
  const card = openCard({ prompt: request.prompt ?? "", seed: request.seed, ratio, onCancel: () => controller.abort() });
  controller.signal.addEventListener("abort", card.cancelled);
  cards.push(card);
  inProgress.add(controller);
  return () => generateOne(request, start, card, controller);
}

/** Returns "done", "cancelled" or the error. */
async function generateOne(request, start, card, controller) {
  try {
    controller.signal.throwIfAborted();
    card.sent();
    for await (const { name, data } of generate(request, start, controller.signal)) {
      if (name === "queued") card.queued(data);
      else if (name === "preview") card.preview(blobOf(data));
      else if (name === "progress") {
        card.progress(data);
        announce(`Step ${data.step} of ${data.steps}, ${inWords(data.seconds_left)}.`);
      } else if (name === "completed") {
        const { preview_every_steps, ...settings } = request;
        await finish(card, { settings, ...start, image: blobOf(data), start: start.image, parameters: data.parameters });
      }
    }
    return "done";
  } catch (error) {
    if (controller.signal.aborted) return "cancelled";
    card.failed("Not generated");
    return error;
  } finally {
    inProgress.delete(controller);
  }
}

async function finish(card, entry) {
  showFinished(card, entry);
  await past.add(entry);
  listHistory();
}

function showFinished(card, entry) {
  card.finished(entry, [
    { label: "Use as input", act: () => useAsInput(entry) },
    { label: "Use settings", act: () => useSettings(entry) },
  ]);
}

async function useAsInput({ image }) {
  await input.set(image);
  part("img").focus();
  part("img").scrollIntoView({ block: "nearest" });
  announce("This image is now the one to start from.", true);
}

async function useSettings({ settings, kind, start, mask }) {
  clearProblems(form);
  alertTo("");
  await input.write({ kind, image: start, mask });
  writeSettings(form, [...TEXT_FIELDS, "strength"], settings);
  loras.write(settings.loras ?? []);
  if (MORE_FIELDS.some((name) => form.elements[name].value !== (form.elements[name].defaultValue ?? ""))) part("more").open = true;
  part("prompt").focus();
  announce(`Its settings are in the form, seed ${settings.seed}.`, true);
}

function listHistory() {
  const list = part("history-list");
  for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  list.replaceChildren(...past.entries.map(historyItem));
  part("history").hidden = past.entries.length === 0;
  if (!past.isKept()) part("history-note").textContent = "This browser does not let the page keep images: they are gone when the page is closed.";
}

function historyItem(entry) {
  const image = element("img", { alt: "", src: URL.createObjectURL(entry.image), loading: "lazy" });
  const button = element("button", { type: "button", title: entry.settings.prompt }, image);
  button.setAttribute("aria-label", `${entry.settings.prompt}, seed ${entry.settings.seed}`);
  button.addEventListener("click", async () => {
    if (!isBusy) {
      const card = openCard({ prompt: entry.settings.prompt, seed: entry.settings.seed, ratio: 1, onCancel: () => {} });
      showFinished(card, entry);
      replaceCards(cards, [card]);
    }
    await useSettings(entry);
  });
  return element("li", {}, button);
}

/** `old` cards that are not among the new ones are let go. */
function replaceCards(old, kept) {
  for (const card of [...old, ...cards]) if (!kept.includes(card)) card.forget();
  cards = kept;
  showCards();
}

function showCards() {
  part("cards").replaceChildren(...cards.map((card) => card.element));
  part("cards").classList.toggle("several", cards.length > 1);
  part("empty").hidden = cards.length > 0;
}

/** Generate and Cancel take turns; who used one of them by keyboard finds the other in its place. */
function showGenerating(isGenerating) {
  const [before, after] = isGenerating ? [part("draw"), part("cancel")] : [part("cancel"), part("draw")];
  const hadFocus = [before, document.body].includes(document.activeElement); // the body where a card's own button is gone
  before.hidden = true;
  after.hidden = false;
  if (hadFocus) after.focus({ preventScroll: true });
  if (isGenerating && matchMedia(ONE_COLUMN).matches) part("result").scrollIntoView();
}

function cancelAll() {
  for (const controller of inProgress) controller.abort();
}

function showError(error) {
  if (error instanceof Refused) tell(error.problems, error.message);
  else if (error instanceof Unreachable) tell([], "The server cannot be reached. Check that it is running and try again.");
  else {
    tell([], "Something went wrong in this page. Reload it and try again.");
    throw error;
  }
}

/** At the fields where they are in the form; the rest, or the whole where nothing names a field, in the alert. */
function tell(problems, message) {
  const elsewhere = showProblems(form, problems);
  const count = problems.length - elsewhere.length;
  const atFields = count === 0 ? [] : [count === 1 ? "Check the marked field." : "Check the marked fields."];
  const rest = elsewhere.length ? elsewhere : count ? [] : [message];
  alertTo([...rest.map(capitalised), ...atFields].join(" "));
  if (!count) part("alert").focus();
}

function alertTo(text) {
  part("alert").textContent = text;
}

function showInputProblem(message) {
  if (message) showProblems(form, [{ field: "img", message }]);
  else clearProblems(form);
}

function showStrength() {
  part("strength-value").textContent = Number(form.elements.strength.value).toFixed(2);
}

function inputRatio() {
  const { naturalWidth, naturalHeight } = part("input-picture");
  return naturalWidth / naturalHeight || 1;
}

let lastAnnounced = 0;

function announce(text, isImportant = false) {
  if (!isImportant && Date.now() - lastAnnounced < ANNOUNCE_EVERY_MS) return;
  lastAnnounced = Date.now();
  part("status").textContent = text;
}
