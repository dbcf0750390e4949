// Sorting, filters, columns and copies of tables; methods of plots; images at full size. Nothing is loaded or sent.
"use strict";
(() => {
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const PREFIX = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18, Z: 1e21 };

  // The figure that a cell begins with: "−1.2 [..]", "24.6 kB", "< 0.001"; NaN for words.
  const figure = (text) => {
    const found = text.replace(/−/g, "-").replace(/,(?=\d{3})/g, "").match(/^(< )?([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([kMGTPEZ](?=B|FLOP|J))?/);
    return found ? Number(found[2]) * (PREFIX[found[3]] || 1) * (found[1] ? 0.5 : 1) : NaN;
  };
  const content = (cell) => (cell.querySelector("summary") || cell).textContent.trim();

  const compare = (index, down) => (one, other) => {
    const [a, b] = [one, other].map((row) => content(row.cells[index]));
    const [x, y] = [figure(a), figure(b)];
    const numbers = !Number.isNaN(x) && !Number.isNaN(y);
    if (!numbers && Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // what is missing comes last
    return (numbers ? x - y : a.localeCompare(b)) * (down ? -1 : 1);
  };

  const rowsOf = (body) => all("tr:not(.setting)", body);

  function sortable(table) {
    all("thead th", table).forEach((head, index) => {
      const button = make("button", { type: "button", className: "sort", title: "Sort by this column" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        // Figures begin with the largest, words with a.
        const order = head.ariaSort;
        const down = order ? order === "ascending" : head.classList.contains("number");
        all("thead th", table).forEach((other) => { other.ariaSort = null; });
        head.ariaSort = down ? "descending" : "ascending";
        all("tbody", table).forEach((body) => body.append(...rowsOf(body).sort(compare(index, down))));
      });
    });
  }

  function filterable(table, tools) {
    const field = make("input", { type: "search", placeholder: "Filter rows", ariaLabel: "Filter rows" });
    const count = make("span", { className: "count" });
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0, every = 0;
      all("tbody", table).forEach((body) => {
        const heading = body.querySelector(".setting")?.textContent.replace(/\s+/g, " ") || "";
        const rows = rowsOf(body);
        rows.forEach((row) => {
          const text = `${heading} ${[...row.cells].map(content).join(" ")}`.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
          shown += !row.hidden;
        });
        every += rows.length;
        body.hidden = rows.every((row) => row.hidden);
      });
      count.textContent = words.length ? `${shown} of ${every} rows` : "";
    });
    tools.append(field, count);
  }

  function choosable(table, tools) {
    const heads = all("thead th", table);
    const show = (index, visible) => {
      heads[index].hidden = !visible;
      all("tbody tr:not(.setting)", table).forEach((row) => { row.cells[index].hidden = !visible; });
    };
    const list = make("div", { className: "choices" });
    heads.forEach((head, index) => {
      const box = make("input", { type: "checkbox", checked: !head.classList.contains("optional") });
      if (!box.checked) show(index, false);
      box.addEventListener("change", () => show(index, box.checked));
      if (index) list.append(make("label", {}, box, ` ${head.textContent}`));
    });
    if (heads.length < 5) return;
    const hidden = heads.filter((head) => head.hidden).length;
    tools.append(make("details", { className: "columns" }, make("summary", {}, hidden ? `Columns (${hidden} more)` : "Columns"), list));
  }

  // Visible cells, each row with its setting in front.
  function cellsOf(table) {
    const heads = all("thead th", table);
    const kept = heads.map((head, index) => index).filter((index) => !heads[index].hidden);
    const groups = all("tbody", table).filter((body) => !body.hidden);
    const names = [...new Set(groups.flatMap((body) => all(".setting small", body).map((one) => one.textContent)))];
    const lines = groups.flatMap((body) => {
      const setting = new Map(all(".setting span", body).map((one) => [one.querySelector("small").textContent, one.querySelector("b").textContent]));
      const front = names.map((name) => setting.get(name) || "");
      return rowsOf(body).filter((row) => !row.hidden).map((row) => [...front, ...kept.map((index) => content(row.cells[index]))]);
    });
    return [[...names, ...kept.map((index) => heads[index].textContent.trim())], ...lines];
  }

  const csv = (lines) => lines.map((line) => line.map((cell) => (/[",\n]/.test(cell) ? `"${cell.replace(/"/g, '""')}"` : cell)).join(",")).join("\n");
  const TEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "–": "--", "×": "$\\times$", "→": "$\\to$", "<": "$<$", ">": "$>$", "=": "=", "λ": "$\\lambda$" };
  const tex = (cell) => cell.replace(/[\\~^±−–×→<>λ]|[&%$#_{}]/g, (sign) => TEX[sign] || `\\${sign}`);
  const latex = ([head, ...lines]) => [
    `\\begin{tabular}{${"l".repeat(head.length)}}`, "  \\toprule", `  ${head.map(tex).join(" & ")} \\\\`, "  \\midrule",
    ...lines.map((line) => `  ${line.map(tex).join(" & ")} \\\\`), "  \\bottomrule", "\\end{tabular}",
  ].join("\n");

  async function put(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page opened from a file may not be allowed to
      const area = make("textarea", { value: text, className: "copied" });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1200);
  }

  function copyable(table, tools) {
    [["Copy CSV", csv], ["Copy LaTeX", latex]].forEach(([label, form]) => {
      const button = make("button", { type: "button" }, label);
      button.addEventListener("click", () => { table.dataset.copied = form(cellsOf(table)); put(table.dataset.copied, button); });
      tools.append(button);
    });
  }

  all(".grid").forEach((grid) => {
    const table = grid.querySelector("table");
    const tools = make("div", { className: "tools" });
    if (all("tbody tr:not(.setting)", table).length > 6) filterable(table, tools);
    choosable(table, tools);
    copyable(table, tools);
    sortable(table);
    grid.prepend(tools);
  });

  // A method of a legend: in colour and in front while it is chosen.
  all(".figures").forEach((figures) => {
    all(".legend li", figures).forEach((item) => {
      const button = make("button", { type: "button", ariaPressed: "false" }, ...item.childNodes);
      item.replaceChildren(button);
      const marks = all(`[data-method="${CSS.escape(item.dataset.method)}"]`, figures).filter((one) => one !== item);
      const raise = (on) => {
        [item, ...marks].forEach((one) => one.classList.toggle("raised", on));
        figures.classList.toggle("choosing", Boolean(figures.querySelector(".raised")));
      };
      const chosen = () => button.ariaPressed === "true";
      item.addEventListener("pointerenter", () => raise(true));
      item.addEventListener("pointerleave", () => raise(chosen()));
      button.addEventListener("click", () => { button.ariaPressed = String(!chosen()); raise(chosen()); });
    });
  });

  // An image at full size, beside those of the same place in the other strips of its class.
  const pictures = all(".images img");
  if (pictures.length) {
    const view = make("div", { className: "view" });
    const close = make("button", { type: "button", className: "close", ariaLabel: "Close" }, "Close");
    const dialog = make("dialog", { className: "zoom", ariaLabel: "Images at full size" }, close, view);
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    document.body.append(dialog);
    const open = (picture) => {
      const strip = picture.closest(".strip"), place = [...picture.parentNode.children].indexOf(picture);
      const beside = all(".strip", picture.closest(".class")).filter((one) => one === strip || ["start", "nearest real"].includes(one.dataset.strip));
      const next = strip.nextElementSibling;
      const shown = beside.filter((one) => one === strip || one.dataset.strip === "start" || one === next).map((one) => one.querySelectorAll("img")[place]).filter(Boolean);
      view.replaceChildren(...shown.map((one) => make("figure", {}, make("img", { src: one.src, alt: one.alt }), make("figcaption", {}, one.title))));
      dialog.showModal();
    };
    pictures.forEach((picture) => {
      picture.tabIndex = 0;
      picture.setAttribute("role", "button");
      picture.addEventListener("click", () => open(picture));
      picture.addEventListener("keydown", (event) => { if (event.key === "Enter") open(picture); });
    });
  }
})();
