"use strict";
(() => {
  const data = JSON.parse(document.getElementById("samples-data").textContent);
  const root = document.getElementById("samples-table");
  const NAMES = { defense: "defence", fc: "FC head" };
  const COLUMNS = [
    ["target", "Target"], ["context", "Context"], ["index", "Sample"], ["label", "Label"], ["batch", "Batch"],
    ["position", "Place"], ["prediction", "Clean answer"], ["fate", "Fate"], ["by", "Broken first by"],
    ["at", "Iterate"], ["runs", "Runs that broke it"], ["margin", "Smallest lead"],
  ];
  const TEXT = new Set(["target", "context", "fate", "by"]);
  const PAGE = 50;
  const rows = [];
  for (const part of data.parts) {
    for (let i = 0; i < part.fate.length; i++) {
      const at = part.place ? part.place[i] : i;
      rows.push({
        target: NAMES[part.target] || part.target, context: part.context, index: data.index[at], label: data.label[at],
        batch: data.batch[at], position: data.position[at], prediction: part.prediction[i], fate: data.fates[part.fate[i]],
        by: part.by[i] < 0 ? null : data.names[part.by[i]], at: part.at[i], runs: part.runs[i], margin: part.margin[i],
      });
    }
  }
  const state = { sort: null, down: false, page: 0, filters: {} };
  const element = (tag, text, attributes) => {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = String(text);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    return made;
  };
  const matches = (row) => Object.entries(state.filters).every(([key, wanted]) => {
    if (wanted === "") return true;
    if (key === "index") return String(row.index) === wanted;
    if (key === "only") return row.runs === 1;
    return String(row[key]) === wanted;
  });
  const compare = (a, b) => {
    const x = a[state.sort], y = b[state.sort];
    if (x === y) return 0;
    if (x === null) return 1; // what is missing comes last, whichever way
    if (y === null) return -1;
    return (x < y ? -1 : 1) * (state.down ? -1 : 1);
  };
  const controls = element("div", null, { class: "controls" });
  const refilter = (key, value) => { state.filters[key] = value; state.page = 0; show(); };
  const choice = (key, title) => {
    const label = element("label", title);
    const select = element("select", null, { "data-filter": key });
    select.append(element("option", "all", { value: "" }));
    const values = [...new Set(rows.map((row) => row[key]).filter((value) => value !== null))];
    values.sort((x, y) => (x < y ? -1 : x > y ? 1 : 0));
    for (const value of values) select.append(element("option", value, { value: String(value) }));
    select.addEventListener("change", () => refilter(key, select.value));
    label.append(select);
    controls.append(label);
  };
  for (const key of ["target", "context", "label", "fate", "by"]) choice(key, COLUMNS.find(([name]) => name === key)[1]);
  const searched = element("label", "Sample");
  const search = element("input", null, { type: "text", inputmode: "numeric", "data-filter": "index" });
  search.addEventListener("input", () => refilter("index", search.value.trim()));
  searched.append(search);
  const single = element("label", "Broken by one run alone");
  const only = element("input", null, { type: "checkbox", "data-filter": "only" });
  only.addEventListener("change", () => refilter("only", only.checked ? "1" : ""));
  single.append(only);
  controls.append(searched, single);
  const scroll = element("div", null, { class: "scroll", tabindex: "0", role: "region", "aria-label": "Samples" });
  const table = element("table");
  const head = element("tr");
  for (const [key, title] of COLUMNS) {
    const cell = element("th", null, { scope: "col", "data-key": key, class: TEXT.has(key) ? "text" : "" });
    const button = element("button", title, { type: "button" });
    button.addEventListener("click", () => {
      state.down = state.sort === key && !state.down;
      state.sort = key;
      state.page = 0;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      show();
    });
    cell.append(button);
    head.append(cell);
  }
  const thead = element("thead");
  thead.append(head);
  const body = element("tbody");
  table.append(thead, body);
  scroll.append(table);
  const pager = element("div", null, { class: "controls" });
  const back = element("button", "Previous", { type: "button" });
  const forward = element("button", "Next", { type: "button" });
  const told = element("span", null, { role: "status" });
  back.addEventListener("click", () => { state.page -= 1; show(); });
  forward.addEventListener("click", () => { state.page += 1; show(); });
  pager.append(back, told, forward);
  const show = () => {
    const found = rows.filter(matches);
    if (state.sort) found.sort(compare);
    const first = state.page * PAGE;
    const shown = found.slice(first, first + PAGE);
    body.replaceChildren(...shown.map((row) => {
      const line = element("tr");
      for (const [key] of COLUMNS) line.append(element("td", row[key] === null ? "\u2013" : row[key], { class: TEXT.has(key) ? "text" : "" }));
      return line;
    }));
    told.textContent = found.length ? `${first + 1}\u2013${first + shown.length} of ${found.length} rows` : "no row fits";
    back.disabled = state.page === 0;
    forward.disabled = first + PAGE >= found.length;
  };
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
  root.replaceChildren(controls, scroll, pager);
  show();
})();
