/** The fields: their limits, their values, and what is wrong with them. Knows nothing of requests. */

/** Limits, defaults and choices as the server tells them in GET /capabilities. */
export function applyCapabilities(form, { fields, schedulers, default_scheduler }) {
  for (const [name, limits] of Object.entries(fields)) {
    const control = form.elements[name];
    if (!control) continue;
    if (limits.maxLength) control.maxLength = limits.maxLength;
    if (isNumber(control)) setRange(control, limits);
  }
  for (const { names } of schedulers) form.elements.scheduler.add(new Option(names[0], names[0]));
  const ofModel = schedulers.find(({ scheduler }) => scheduler === default_scheduler)?.names[0] ?? default_scheduler;
  form.elements.scheduler.options[0].text = `Default (${ofModel})`;
  const { minimum, maximum } = fields.guidance_scale;
  document.getElementById("guidance-range").textContent = `${minimum}–${maximum}`; // a model may allow less than others
}

export function setRange(control, { minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, default: standard }) {
  control.step = multipleOf ?? (control.step || 1); // the page says it where a field is no whole number
  const step = Number(control.step) || 0; // "any"
  control.min = minimum ?? exclusiveMinimum + step;
  control.max = maximum ?? exclusiveMaximum - step;
  if (standard !== null && standard !== undefined) control.value = control.defaultValue = standard;
}

function isNumber({ type }) {
  return type === "number" || type === "range";
}

/** The fields that were filled in, as the server wants them; what is left out takes its default. */
export function readSettings(form, names) {
  const settings = {};
  for (const name of names) {
    const control = form.elements[name];
    if (control.value.trim() !== "") settings[name] = isNumber(control) ? Number(control.value) : control.value;
  }
  return settings;
}

export function writeSettings(form, names, settings) {
  for (const name of names) {
    const control = form.elements[name];
    control.value = settings[name] ?? control.defaultValue ?? "";
    control.dispatchEvent(new Event("input", { bubbles: true }));
  }
}

/** Fields that hold what is no number at all, which a browser tells nobody but us. */
export function notNumbers(form) {
  const wrong = [...form.querySelectorAll("input[type=number]")].filter((control) => control.validity.badInput);
  return wrong.map(({ id }) => ({ field: id, message: "Enter a number." }));
}

/** Show each problem at its field and go to the first one. Returns those whose field is not in the form. */
export function showProblems(form, problems) {
  clearProblems(form);
  const elsewhere = [];
  let first = null;
  for (const { field, message } of problems) {
    const control = field && document.getElementById(field);
    if (!control || !form.contains(control) || control.closest("[hidden]")) {
      elsewhere.push(message);
      continue;
    }
    showProblem(control, message.replace(`${field}: `, ""));
    control.closest("details")?.setAttribute("open", "");
    first ??= control;
  }
  if (first) focusable(first).focus();
  return elsewhere;
}

function focusable(control) {
  if (control.id === "mask") return document.getElementById("mask-all");
  return control.id === "loras" ? control.querySelector("select, button") : control;
}

function showProblem(control, message) {
  const id = `${control.id}-problem`;
  const text = document.getElementById(id) ?? document.createElement("p");
  text.id = id;
  text.className = "problem";
  text.textContent = [text.textContent, capitalised(message)].filter(Boolean).join(" ");
  const box = control.id === "mask" ? document.getElementById("mask-tools") : control.closest(".drop, .field");
  box.append(text);
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", id);
}

export function clearProblems(form) {
  for (const control of form.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
  for (const text of form.querySelectorAll(".problem")) text.remove();
}

export function capitalised(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
