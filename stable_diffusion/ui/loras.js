/** The LoRAs of a request: a row for each, with a choice of those that the server has, and a weight. Knows nothing of requests. */

import { setRange } from "./form.js";
import { element } from "./results.js";

export function openLoras() {
  const part = (id) => document.getElementById(id);
  const add = part("add-lora");
  let offered = []; // [{name, alias}]
  let mostRows = 0;
  let weightLimits = {};
  let rows = [];
  let made = 0; // rows ever, for ids that are used once

  const names = () => rows.map((row) => row.name());
  const free = () => offered.filter(({ name }) => !names().includes(name));
  const show = () => {
    rows.forEach((row, index) => row.number(index + 1));
    for (const row of rows) row.disable(names().filter((name) => name !== row.name())); // no LoRA is chosen twice
    add.hidden = rows.length >= mostRows || free().length === 0;
    part("loras").hidden = offered.length === 0 && rows.length === 0;
  };
  const append = (name, weight) => {
    made += 1;
    const row = makeRow({ id: `lora-${made}`, offered, name, weightLimits, weight });
    row.select.addEventListener("change", show);
    row.remove.addEventListener("click", () => remove(row));
    rows.push(row);
    part("lora-rows").append(row.element);
    show();
    return row;
  };
  const remove = (row) => {
    const index = rows.indexOf(row);
    rows.splice(index, 1);
    row.element.remove();
    show();
    const next = rows[Math.min(index, rows.length - 1)]?.remove ?? add;
    next.focus();
  };
  add.addEventListener("click", () => append(free()[0].name).select.focus());

  return {
    /** `loras` and the limits of the field, as GET /capabilities has them. */
    offer({ loras, fields }) {
      offered = loras;
      mostRows = fields.loras.maxItems;
      weightLimits = fields.loras.items.properties.weight;
      show();
    },
    /** [{name, weight}], as the server wants them. */
    read: () => rows.map(({ name, weight }) => ({ name: name(), weight: Number(weight.value) })),
    /** The server may no longer have one of them: its row says so. */
    write(loras) {
      part("lora-rows").replaceChildren();
      rows = [];
      for (const { name, weight } of loras) append(name, weight);
      show();
    },
    /** Weights that the server would refuse without saying of which LoRA. What is no number at all is not among them. */
    problems() {
      const wrong = rows.map((row) => row.weight).filter(({ value, validity, min, max }) => {
        return !validity.badInput && (value === "" || Number(value) < min || Number(value) > max);
      });
      return wrong.map(({ id, min, max }) => ({ field: id, message: `Must be from ${min} to ${max}.` }));
    },
  };
}

/** `weight` is the server's default where it is left out. */
function makeRow({ id, offered, name: chosen, weightLimits, weight: chosenWeight }) {
  const numbers = [];
  const number = (before) => {
    const text = element("span", {});
    numbers.push(text);
    return [before, text];
  };
  const options = offered.map(({ name, alias }) => new Option(alias === name ? name : `${name} (${alias})`, name));
  if (!offered.some(({ name }) => name === chosen)) options.unshift(new Option(`${chosen} (not on this server)`, chosen));
  const select = element("select", { id }, ...options);
  select.value = chosen;

  const weight = element("input", { id: `${id}-weight`, type: "number", step: "0.1", inputMode: "decimal" });
  setRange(weight, weightLimits);
  weight.value = chosenWeight ?? weight.value;
  const remove = element("button", { type: "button", className: "plain" }, "Remove", element("span", { className: "unseen" }, ...number(" LoRA ")));
  const weightLabel = element("label", { htmlFor: weight.id }, "Weight", element("span", { className: "unseen" }, ...number(" of LoRA ")));
  return {
    element: element(
      "div",
      { className: "field lora" },
      element("div", {}, element("label", { htmlFor: id }, ...number("LoRA ")), select),
      element("div", {}, weightLabel, weight),
      remove,
    ),
    select,
    weight,
    remove,
    name: () => select.value,
    number(position) {
      for (const text of numbers) text.textContent = position;
    },
    disable(names) {
      for (const option of select.options) option.disabled = names.includes(option.value);
    },
  };
}
