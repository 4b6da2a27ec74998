// The calculator of the chapter "The LoRA floor": how many numbers a method trains on a model.
// It counts as tinylora_lite.counting does (tests/site/test_calculator.py compares the two) and needs
// nothing but this file and the shapes that the chapter's own code left in the page.
"use strict";

// A model is {layers, modules, all}: `modules` are [out, in] of one layer's seven matrices in the order
// q, k, v, o, gate, up, down; `all` is every parameter.

/** How many numbers a method trains; an Error with a sentence for whoever asked for what cannot be. */
function count(model, method, { rank, u, nTie, tying }) {
  const sum = (numbersOf) => model.layers * model.modules.reduce((total, module) => total + numbersOf(module), 0);
  const types = model.modules.length;
  if (method === "full") return model.all;
  if (method === "tinylora") {
    check("u", u);
    if (nTie === "all") return u;
    check("nTie", nTie);
    return u * (tying === "tiled" ? Math.ceil((model.layers * types) / nTie) : types * Math.ceil(model.layers / nTie));
  }
  check("rank", rank);
  if (method === "lora") return sum(([rows, columns]) => rank * (rows + columns));
  if (method === "vera") return sum(([rows]) => rank + rows);
  const smallest = Math.min(...model.modules.flat());
  if (rank > smallest) throw new Error(`LoRA-XS takes its factors from the weights; here its rank ends at ${smallest}.`);
  return sum(() => rank ** 2);
}

/** A Llama of one's own: four sizes, a vocabulary, and whether the output shares the embeddings. */
function llama({ tied, ...sizes }) {
  SIZES.forEach((name) => check(name, sizes[name]));
  const { layers, width, kv, mlp, vocabulary } = sizes;
  const modules = [[width, width], [kv, width], [kv, width], [width, width], [mlp, width], [mlp, width], [width, mlp]];
  const weights = modules.reduce((total, [rows, columns]) => total + rows * columns, 2 * width);
  return { layers, modules, all: layers * weights + width + (tied ? 1 : 2) * vocabulary * width };
}

const SIZES = ["layers", "width", "kv", "mlp", "vocabulary"];

// Every field of the form: what it is called there, and the most it takes. Sums stay below 2^53 and so exact.
const FIELDS = {
  layers: ["layers", 1e3], width: ["width", 1e6], kv: ["keys and values", 1e6], mlp: ["MLP", 1e6],
  vocabulary: ["vocabulary", 1e6], rank: ["rank r", 1e5], u: ["u, numbers in one v", 1e6],
  nTie: ["n_tie, modules that share it", 1e6],
};

function check(name, value) {
  const [title, most] = FIELDS[name];
  if (Number.isInteger(value) && value >= 1 && value <= most) return;
  throw new Error(`Give \u201c${title}\u201d as a whole number from 1 to ${grouped(most)}.`);
}

function grouped(number) {
  return number.toLocaleString("en", { maximumFractionDigits: 0 });
}

function roughly(number) {
  return number < 1000 ? Number(number.toPrecision(3)).toString() : grouped(number);
}

/** Bytes as one would say them: 26 B, 5.05 MB. */
function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  const rounded = Number(bytes.toPrecision(3));
  const step = Math.min(4, Math.floor(Math.log10(rounded) / 3));
  return `${roughly(rounded / 1000 ** step)} ${["", "kB", "MB", "GB", "TB"][step]}`;
}

/** What a method is called, settings and all. */
function named(method, { rank, u, nTie, tying }) {
  const settings = nTie === "all" ? "all tied" : `n_tie = ${nTie}${nTie > 1 && tying === "structured" ? ", structured" : ""}`;
  return {
    full: "all weights", lora: `LoRA, r = ${rank}`, vera: `VeRA, r = ${rank}`, lora_xs: `LoRA-XS, r = ${rank}`,
    tinylora: `TinyLoRA, u = ${u}, ${settings}`,
  }[method];
}

const RUNGS = [
  ["full", {}], ["lora", { rank: 1 }], ["vera", { rank: 1 }], ["lora_xs", { rank: 1 }],
  ["tinylora", { u: 1, nTie: 16, tying: "tiled" }], ["tinylora", { u: 1, nTie: "all", tying: "tiled" }],
];

/** The rungs of a model's ladder and the chosen one among them, from the largest to the smallest. */
function ladder(model, method, settings) {
  const rungs = [...RUNGS, [method, settings]].map(([of, given], index) => ({
    method: of, label: named(of, given), numbers: count(model, of, given), chosen: index === RUNGS.length,
  }));
  const chosen = rungs.at(-1);
  return rungs.filter((rung) => rung === chosen || rung.label !== chosen.label).sort((a, b) => b.numbers - a.numbers);
}

/** What the choice comes to, in a sentence. */
function verdict(model, numbers) {
  const floor = count(model, "lora", { rank: 1 });
  if (numbers === floor) return "This is the LoRA floor.";
  return numbers < floor
    ? `The LoRA floor, ${grouped(floor)}, is ${roughly(floor / numbers)} times as many.`
    : `This is ${roughly(numbers / floor)} times the LoRA floor of ${grouped(floor)}.`;
}

const input = (name, value = "", range = FIELDS[name]) =>
  `${range[0]} <input name="${name}" type="number" min="1" max="${range[1]}" value="${value}" required>`;

const FORM = `
  <div class="calculator-fields">
    <label class="wide">Model <select name="model"></select></label>
    <label class="wide">Method <select name="method">
      <option value="tinylora">TinyLoRA</option><option value="lora_xs">LoRA-XS</option><option value="vera">VeRA</option>
      <option value="lora">LoRA</option><option value="full">all weights</option>
    </select></label>
    <fieldset data-for="own">
      <legend>Its shape</legend>
      ${SIZES.map((name) => `<label>${input(name)}</label>`).join("")}
      <label class="tick"><input name="tied" type="checkbox"> output shares the embeddings</label>
    </fieldset>
    <label data-for="lora lora_xs vera">${input("rank", 1)}</label>
    <label data-for="tinylora">${input("u", 1)}</label>
    <label data-for="tinylora">${input("nTie", 16)}</label>
    <label data-for="tinylora" class="tick"><input name="allTied" type="checkbox"> all share one v</label>
    <label data-for="tinylora">tying <select name="tying"><option>tiled</option><option>structured</option></select></label>
  </div>
  <output aria-live="polite" aria-atomic="true"></output>
  <table>
    <caption></caption>
    <thead><tr><th scope="col">what trains</th><th scope="col">numbers</th><th scope="col">in bf16</th></tr></thead>
    <tbody></tbody>
  </table>`;

function start(place) {
  const data = JSON.parse(place.querySelector("script").textContent);
  const form = document.createElement("form");
  form.className = "calculator-form";
  form.setAttribute("aria-label", "Calculator: numbers that a method trains on a model");
  form.innerHTML = FORM;
  const field = form.elements;
  for (const [name, { label }] of Object.entries(data.models)) field.model.add(new Option(label, name));
  field.model.add(new Option("a shape of your own", "own"));
  field.model.value = data.start;

  const number = (name) => (field[name].value === "" ? NaN : Number(field[name].value));

  function update() {
    const own = field.model.value === "own";
    const shown = [field.method.value, own ? "own" : ""];
    for (const part of form.querySelectorAll("[data-for]")) {
      part.hidden = !part.dataset.for.split(" ").some((name) => shown.includes(name));
    }
    if (!own) {
      // A shape of one's own starts from the model that was shown last.
      const known = data.models[field.model.value];
      for (const name of SIZES) field[name].value = known[name];
      field.tied.checked = known.tied;
    }
    field.nTie.disabled = field.allTied.checked;
    field.tying.disabled = field.allTied.checked;
    for (const input of form.querySelectorAll("input[type=number]")) {
      input.setAttribute("aria-invalid", String(!input.disabled && !input.closest("[hidden]") && !input.validity.valid));
    }
    show(own);
  }

  function show(own) {
    const output = form.querySelector("output");
    const table = form.querySelector("table");
    const settings = {
      rank: number("rank"), u: number("u"), nTie: field.allTied.checked ? "all" : number("nTie"), tying: field.tying.value,
    };
    let model, rungs;
    try {
      const shape = Object.fromEntries(SIZES.map((name) => [name, number(name)]));
      model = own ? llama({ ...shape, tied: field.tied.checked }) : data.models[field.model.value];
      rungs = ladder(model, field.method.value, settings);
    } catch (error) {
      output.textContent = error.message;
      table.hidden = true;
      return;
    }
    const { numbers } = rungs.find((rung) => rung.chosen);
    const strong = document.createElement("strong");
    strong.textContent = `${grouped(numbers)} ${numbers === 1 ? "number" : "numbers"}`;
    const bytes = document.createElement("span");
    bytes.textContent = `${size(4 * numbers)} in fp32, ${size(2 * numbers)} in bf16`;
    const compared = document.createElement("span");
    compared.textContent = verdict(model, numbers);
    output.replaceChildren(strong, " ", bytes, " ", compared);
    table.hidden = false;
    table.caption.textContent = `The ladder of ${own ? "this model" : model.label}, on a logarithmic scale`;
    table.tBodies[0].replaceChildren(...rungs.map((rung) => row(rung, model.all)));
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  place.append(form);
  update();
}

function row({ method, label, numbers, chosen }, largest) {
  const line = document.createElement("tr");
  line.dataset.method = method;
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = label;
  if (chosen) {
    line.className = "chosen";
    head.append(" (your choice)");
  }
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  bar.style.setProperty("--share", Math.log(numbers) / Math.log(largest));
  head.append(bar);
  line.append(head, ...[grouped(numbers), size(2 * numbers)].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  }));
  return line;
}

if (typeof module !== "undefined") module.exports = { count, llama, ladder, size, verdict };
else document.querySelectorAll(".calculator").forEach(start);
