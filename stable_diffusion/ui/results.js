/** A card for each image: its progress, its previews, the image and what can be done with it. Knows nothing of requests. */

const SMALL = 256; // pixels: images below are shown with their pixels as they are

/** `ratio` is width / height, as far as it is known; the `seed` tells its controls from those of others; `onCancel` is called by its button. */
export function openCard({ prompt, seed, ratio, onCancel }) {
  const shown = element("img", { alt: "" });
  const bar = element("progress", { max: 1 });
  bar.setAttribute("aria-label", `Progress of seed ${seed}`);
  const state = element("span", { textContent: "Waiting for other images" });
  const cancel = element("button", { type: "button", className: "plain" }, ...labelled("Cancel", seed));
  cancel.addEventListener("click", onCancel);
  const frame = element("div", { className: "frame" }, shown);
  const footer = element("div", { className: "generating" }, bar, element("div", { className: "row apart" }, state, cancel));
  const card = element("figure", { className: "card" }, frame, footer);
  card.style.setProperty("--ratio", ratio);
  shown.hidden = true;

  const show = (blob) => {
    URL.revokeObjectURL(shown.src);
    shown.src = URL.createObjectURL(blob);
    shown.hidden = false;
  };
  shown.addEventListener("load", () => {
    card.style.setProperty("--ratio", shown.naturalWidth / shown.naturalHeight);
    frame.classList.toggle("small", Math.max(shown.naturalWidth, shown.naturalHeight) < SMALL);
  });
  const end = (message) => {
    bar.remove();
    cancel.remove();
    state.textContent = message;
    frame.classList.add("ended");
  };
  return {
    element: card,
    sent() {
      state.textContent = "Sent";
    },
    queued({ position, seconds_left }) {
      state.textContent = `Waiting, place ${position}, ${inWords(seconds_left)}`;
    },
    progress({ step, steps, seconds_left }) {
      bar.max = steps;
      bar.value = step;
      state.textContent = `Step ${step} of ${steps}, ${inWords(seconds_left)}`;
    },
    preview: show,
    cancelled: () => end("Cancelled"),
    failed: (message) => end(message),
    /** `actions` are [{label, act}]. */
    finished({ image, settings, parameters, kind }, actions) {
      show(image);
      shown.alt = prompt;
      footer.replaceWith(caption({ settings, parameters, url: shown.src, type: image.type, kind }, actions));
    },
    forget: () => URL.revokeObjectURL(shown.src),
  };
}

/** "about 12 s left" */
export function inWords(seconds) {
  return seconds < 90 ? `about ${Math.max(1, Math.round(seconds))} s left` : `about ${Math.round(seconds / 60)} min left`;
}

function caption({ settings, parameters, url, type, kind }, actions) {
  const { prompt, seed, width, height, num_inference_steps, scheduler, loras = [], safety_flagged, prompt_dropped } = parameters;
  const chosen = settings.scheduler ?? scheduler.replace("Scheduler", ""); // by its short name, where a person chose it
  const facts = [`Seed ${seed}`, `${width} × ${height}`, `${num_inference_steps} steps`, chosen, ...loras.map(({ name, weight }) => `LoRA ${name} ${weight}`)];
  const save = element("a", { className: "plain button", href: url }, ...labelled("Download", seed));
  save.download = `${fileName(prompt, kind)}-${seed}.${type.replace("image/", "").replace("jpeg", "jpg")}`;
  const buttons = actions.map(({ label, act }) => {
    const button = element("button", { type: "button", className: "plain" }, ...labelled(label, seed));
    button.addEventListener("click", act);
    return button;
  });
  const parts = [element("p", { textContent: prompt }), element("p", { className: "aside", textContent: facts.join(" · ") })];
  if (safety_flagged === true) parts.push(element("p", { className: "problem", textContent: "The safety checker flagged this image and made it blank. Change the prompt or the seed and try again." }));
  if (prompt_dropped) parts.push(element("p", { className: "problem", textContent: `The prompt is too long. This part of it was not used: ${prompt_dropped}` }));
  return element("figcaption", {}, ...parts, element("div", { className: "row" }, save, ...buttons));
}

/** What a screen reader tells from the same control of another card. */
function labelled(label, seed) {
  return [label, element("span", { className: "unseen", textContent: ` (seed ${seed})` })];
}

function fileName(prompt, kind) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [kind];
  return words.join("-").slice(0, 60).replace(/-$/, "");
}

export function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
