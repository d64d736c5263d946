/** Small parts of the page. */

/** @typedef {import("./types.js").Instance} Instance */

/**
 * An element of the page by its id.
 *
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @param {new () => T} [kind] Expected class.
 * @returns {T}
 */
export function element(id, kind) {
  const found = document.getElementById(id);
  if (!found || (kind && !(found instanceof kind))) throw new Error(`the page has no ${id}`);
  return /** @type {T} */ (found);
}

/** @param {number} share */
export function percent(share) {
  return `${Math.round(100 * Math.min(Math.max(share, 0), 1))} %`;
}

/** @param {number} bytes */
export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/**
 * Take a file that is dropped on an element.
 *
 * @param {HTMLElement} area
 * @param {(file: File) => void} take
 */
export function takeDropped(area, take) {
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    const file = event.dataTransfer?.files[0];
    if (file) take(file);
  });
}

/** @param {Record<string, number>} times Milliseconds by step. */
export function showTimes(times) {
  element("timing").hidden = false;
  element("times").replaceChildren(
    ...Object.entries(times).flatMap(([step, time]) => {
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = step;
      value.textContent = time < 1000 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(1)} s`;
      return [term, value];
    }),
  );
}

const MANY = 24;

/**
 * Fill the list of words, with a search where there are many.
 *
 * @param {string[]} phrases
 * @param {(phrase: string, chosen: boolean) => void} changed
 */
export function wordChips(phrases, changed) {
  const labels = phrases.map((phrase) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "checkbox";
    input.value = phrase;
    input.addEventListener("change", () => changed(phrase, input.checked));
    label.append(input, phrase);
    return label;
  });
  element("chips").replaceChildren(...labels);
  const filter = element("filter", HTMLInputElement);
  filter.hidden = phrases.length < MANY;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    labels.forEach((label, index) => {
      const chosen = label.querySelector("input")?.checked;
      label.hidden = !chosen && !phrases[index].toLowerCase().includes(wanted);
    });
  });
}

/**
 * Name of an instance: its id and its word, or one of them.
 *
 * @param {Instance} instance
 * @param {string} otherwise Name of one without both.
 */
export function nameOf({ id, phrase }, otherwise) {
  return [id, phrase].filter((part) => part !== undefined && part !== null).join(" ") || otherwise;
}

/**
 * Fill the list of results, or hide it.
 *
 * @param {Instance[] | null} instances
 * @param {string[]} names
 * @param {string[]} colours
 * @returns {number} How many are visible.
 */
export function showInstances(instances, names, colours) {
  element("results").hidden = !instances;
  if (!instances) return 0;
  const rows = instances.map((instance, index) => row(instance, names[index], colours[index]));
  element("list").replaceChildren(...rows);
  const visible = instances.filter((instance) => instance.visible !== false).length;
  element("count").textContent = String(visible);
  return visible;
}

/** @param {Instance} instance @param {string} text @param {string} colour */
function row(instance, text, colour) {
  const item = document.createElement("li");
  const swatch = document.createElement("span");
  const label = document.createElement("span");
  const score = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.background = colour;
  label.textContent = instance.visible === false ? `${text}, not visible` : text;
  score.className = "score";
  score.textContent = percent(instance.score);
  item.classList.toggle("gone", instance.visible === false);
  item.append(swatch, label, score);
  return item;
}
