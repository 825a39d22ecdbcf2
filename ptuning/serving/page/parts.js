// Small pieces of the page. Every text is set as text, never as HTML.

export const $ = (id) => document.getElementById(id);

export function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function say(text, wrong = false) {
  $("said").textContent = text;
  $("said").className = wrong ? "wrong" : "";
}

// Runs what an element asks for, and says what went wrong.
export async function attempt(work, element = null) {
  say("");
  if (element) element.disabled = true;
  try {
    return await work();
  } catch (error) {
    say(error.message, true);
  } finally {
    if (element) element.disabled = false;
  }
}

export const number = (value) => (Math.abs(value) >= 1000 ? value.toLocaleString("en") : String(Number(value.toPrecision(4))));

export function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) {
    if (value !== null && value !== undefined && value !== "") list.append(make("dt", {}, name), make("dd", {}, value));
  }
  return list;
}

export function button(text, work, label = text) {
  const made = make("button", { type: "button", textContent: text, onclick: () => attempt(work, made) });
  made.setAttribute("aria-label", label);
  return made;
}

// Shows a view; `focus` true: its tab has the focus afterwards.
export function show(view, focus = false) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${view}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  history.replaceState(null, "", `#${view}`);
  document.dispatchEvent(new CustomEvent("view", { detail: view }));
}
